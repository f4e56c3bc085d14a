"The service in a process of its own, asked over real connections: many at once, by clients that are slow, false or gone, and stopped while it works."
import asyncio, contextlib, json, logging, os, re, signal, socket, subprocess, sys
import httpx
import numpy as np
import pytest
from conftest import program, root
from pydantic import ValidationError
from starlette.testclient import TestClient
from test_score import build
import rlhf_flant5
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.serve import _listen, main, make_server
from rlhf_flant5.use.gate import FewLines, host_is_allowed
from rlhf_flant5.use.limits import Limits
from rlhf_flant5.use.service import ERRORS, make_app, request_kinds
from rlhf_flant5.data.toy import toy_pairs

texts = [*dict.fromkeys(toy_pairs(150, seed=4)['chosen'][:] + toy_pairs(150, seed=4)['rejected'][:])][:250]


@pytest.fixture(scope='module')
def model(): return build('full_attention_pooling')


@pytest.fixture(scope='module')
def service(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve')/'model'; model.save_pretrained(folder, model.tokenizer, max_tokens=128, temperature=2.)
    p = subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.serve', str(folder), '--port', '0', '--max-bytes', '100000', '--max-seconds', '20'], env=os.environ | {'PYTHONPATH': str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = p.stdout.readline().split()[-1].removesuffix('/docs'); assert url.startswith('http://127.0.0.1:'), p.stderr.read()
    yield p, url
    if p.poll() is None: p.kill()
    p.communicate()


def ask(url, *texts): return httpx.post(url + '/score', json=dict(texts=[*texts]), timeout=30)


def test_200_at_once(service, model):
    "Each answer is that of its own text, though others hang up in between."
    _, url = service; want = model.score(texts)
    async def all_of_them():
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=250)) as client:
            async def one(i):
                try: r = await client.post('/score', json=dict(texts=[texts[i]]), timeout=.001 if i % 5 == 4 else 30)      # every fifth client goes at once
                except httpx.TimeoutException: return np.nan
                assert r.status_code == 200; return r.json()['rewards'][0]
            return np.array(await asyncio.gather(*map(one, range(250))))
    got = asyncio.run(all_of_them()); here = np.arange(250) % 5 != 4
    assert here.sum() == 200 and np.abs(got - want)[here].max() < 1e-5 < want.std()
    health = httpx.get(url + '/health').json(); assert health['batches'] < health['scored']/2 and health['status'] == 'ok'


def test_compare_with_messages(service, model):
    _, url = service; prompt = [dict(role='system', content='Be brief.'), dict(role='user', content='Who?')]
    got = httpx.post(url + '/compare', json=dict(prompt=prompt, a='I do not know.', b='It is a bird.')).json()
    assert abs(got['probability'] - model.compare((prompt, 'I do not know.'), (prompt, 'It is a bird.'))) < 1e-5 and got['temperature'] == 2


def raw(url, data, wait=5):
    "Bytes over a connection of our own; the status that comes back."
    with socket.create_connection(url.removeprefix('http://').split(':'), timeout=wait) as s:
        s.sendall(data); s.settimeout(wait); return int(s.recv(4096).split()[1])


def test_clients_that_are_not_what_they_say(service):
    _, url = service; head = b'POST /score HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n'; h = head % b'localhost'
    chunk = b'%x\r\n%s\r\n' % (50_000, b'x'*50_000)
    assert raw(url, h + b'Transfer-Encoding: chunked\r\n\r\n' + chunk*3) == 413                        # no length is told, and the end never comes
    assert raw(url, h + b'Content-Length: 99999999999\r\n\r\n' + b'x'*100_001) == 413
    assert raw(url, h + b'Content-Length: 3\r\n\r\n{}[') == 422
    got = httpx.post(url + '/score', json={}, headers={'Host': 'evil.example', 'Connection': 'close'}); assert got.status_code == 400 and 'Host must be one of' in got.json()['error']
    assert raw(url, head % b'evil.example' + b'Content-Length: 2\r\n\r\n{}') == 400                     # a name that a web page brought along
    for _ in range(20):                                                                             # these send half and leave
        s = socket.create_connection(url.removeprefix('http://').split(':')); s.sendall(h + b'Content-Length: 500\r\n\r\n{"texts"'); s.close()
    assert ask(url, texts[0]).status_code == 200


def test_framing_and_keys_that_two_readers_read_in_two_ways(service):
    _, url = service
    h = b'POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    assert raw(url, h + b'Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n') == 400
    twice = httpx.post(url + '/score', content='{"texts": ["a"], "texts": ["b"]}', headers={'Content-Type': 'application/json'})
    assert twice.status_code == 422 and "'texts' stands twice" in twice.json()['error']


def test_stops_well_while_it_works(service, model):
    p, url = service
    async def leave():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            asked = [asyncio.ensure_future(client.post('/score', json=dict(texts=texts[:200]))) for _ in range(5)]
            while (await client.get('/health')).json()['waiting'] == 0: await asyncio.sleep(0)
            p.send_signal(signal.SIGTERM); return [r.json()['rewards'] for r in await asyncio.gather(*asked)]
    want = model.score(texts[:200])
    for got in asyncio.run(leave()): assert np.abs(got - want).max() < 1e-5
    assert p.wait(20) == 0 and p.stderr.read() == ''
    with pytest.raises(httpx.ConnectError): ask(url, texts[0])


def test_program_refuses_in_one_line(tmp_path, capsys):
    for args, says in ((['nowhere/at/all'], 'no such folder'), ([str(tmp_path)], 'no config.json'), (['x', '--max-texts', '0'], 'must be above 0')):
        assert main(args) == 2; said = capsys.readouterr().err; assert said.startswith('error: ') and says in said and said.count('\n') == 1
    with socket.create_server(('127.0.0.1', 0)) as s, pytest.raises(ConfigError, match='cannot listen there'): _listen('127.0.0.1', s.getsockname()[1])
    with pytest.raises(ConfigError, match='cannot listen there'): _listen('127.0.0.1', 99999)


def test_two_names_are_none(): assert [host_is_allowed([(b'host', v) for v in names], ['localhost']) for names in ([b'localhost:8'], [b'localhost', b'evil'], [])] == [True, False, False]


def test_interrupted_or_refused_while_it_loads(monkeypatch, capsys):
    for e, code, says in ((KeyboardInterrupt(), 75, 'interrupted (SIGINT)\n'), (PermissionError(13, 'Permission denied', 'x/config.json'), 1, 'failed: x/config.json: Permission denied\n')):
        def load(*_): raise e
        monkeypatch.setattr('rlhf_flant5.serve.load_model', load); assert main(['x']) == code and capsys.readouterr().err == says


def test_ipv6_loopback_checks_names_too(model, tmp_path):
    try: socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError: pytest.skip('no IPv6 here')
    model.save_pretrained(tmp_path/'model', model.tokenizer, max_tokens=128, temperature=2.)
    p = subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.serve', str(tmp_path/'model'), '--host', '::1', '--port', '0'], env=os.environ | {'PYTHONPATH': str(root)}, stdout=subprocess.PIPE, text=True)
    try:
        url = p.stdout.readline().split()[-1].removesuffix('/docs')
        assert [httpx.get(url + '/health', headers=h).status_code for h in ({}, dict(Host='evil.example'))] == [200, 400]
    finally: p.terminate(); p.communicate(timeout=30)


def test_without_the_extra(tmp_path):
    (tmp_path/'fastapi.py').write_text('raise ImportError')
    res = program('rlhf_flant5.serve', 'x', env={'PYTHONPATH': f'{tmp_path}:{root}'})
    assert res.returncode == 2 and res.stderr == "error: serving needs FastAPI and uvicorn; pip install 'rlhf_flant5[serve]'\n"


@pytest.mark.parametrize('asked, n_faults', [(dict(texts=[1]*10**5), 1), (dict(texts=['a']*10**5), 1), (dict(prompts=[1]*10**5), 2), (dict(prompts=[[{}]*10**5]), 3), (dict(messages=[{}]*10**5), 2)])
def test_a_list_is_read_to_its_first_fault(asked, n_faults):
    "A request of a million faults within all limits took seconds in which nobody else was answered."
    with pytest.raises(ValidationError) as e: request_kinds(256)[0].model_validate(asked)
    assert e.value.error_count() <= n_faults


def ask_app(model, path, limits=Limits(), **body):
    with TestClient(make_app(model, limits)) as client: return client.post(path, json=body)


def test_rank_and_a_single_prompt(model):
    prompt, responses = 'What kind of animal is a robin?', ['It is a fish.', 'It is a bird.', 'I do not know.']
    got, want = ask_app(model, '/rank', prompt=prompt, responses=responses).json()['ranking'], model.rank(prompt, responses)
    assert [(r['index'], r['response']) for r in got] == [*zip(want['index'], want.response)] and [r['share'] for r in got] == pytest.approx(want.share)
    assert ask_app(model, '/score', prompt=prompt, responses=responses).json()['rewards'] == pytest.approx(model.score(prompt, responses), abs=1e-5)
    messages = [dict(role='user', content=prompt), dict(role='assistant', content=responses[1])]
    assert ask_app(model, '/score', messages=messages).json()['rewards'] == pytest.approx([model.score(messages)], abs=1e-5)


def test_errors_in_words_of_http(model):
    many = ask_app(model, '/score', Limits(max_texts=3), texts=['a']*4)
    assert (many.status_code, many.json()['error']) == (422, 'texts: 3 at most; send fewer at a time')
    long = ask_app(model, '/score', prompt='Who?', response='It is a bird. '*60)
    assert long.status_code == 422 and 'the model reads 128 at most' in long.json()['error'] and 'the server was started with --too-long error' in long.json()['error'] and 'truncate_left' not in long.json()['error']
    some = ask_app(model, '/score', prompt='Who?')
    assert some.json()['error'].startswith('the request has prompt; give text; or texts; or messages; or prompt and response; or')


def test_what_openapi_says_of_errors(model):
    with TestClient(make_app(model)) as client: said = client.get('/openapi.json').json()
    assert said['info']['version'] == rlhf_flant5.__version__ and 'HTTPValidationError' not in json.dumps(said)
    for path in ('/score', '/compare', '/rank'):
        answers = said['paths'][path]['post']['responses']
        assert {*answers} == {'200', *map(str, ERRORS)}
        assert {answers[str(status)]['content']['application/json']['schema']['$ref'] for status in ERRORS} == {'#/components/schemas/ErrorAnswer'}


def test_the_page_has_requests_that_run(model):
    with TestClient(make_app(model, Limits(max_texts=77))) as client:
        page = client.get('/').text
        asked = re.findall(r"curl -s testserver(/\w+) .* -d '(.*)'", page)
        assert [path for path, _ in asked] == ['/score', '/compare', '/rank'] and '--max-texts<td>77<td>texts in a request' in page
        for path, body in asked: assert client.post(path, content=body, headers={'Content-Type': 'application/json'}).status_code == 200


def test_metrics_count_answers(model):
    with TestClient(make_app(model)) as client:
        for body in (dict(texts=texts[:2]), dict(texts=texts[2:5]), {}): client.post('/score', json=body)
        for i in range(3): client.get(f'/nowhere/{i}')
        said = client.get('/metrics').text.splitlines()
    for line in ('rlhf_flant5_requests_total{path="/score",status="200"} 2', 'rlhf_flant5_requests_total{path="/score",status="422"} 1', 'rlhf_flant5_requests_total{path="other",status="404"} 3', 'rlhf_flant5_texts_total 5'):
        assert line in said


@contextlib.asynccontextmanager
async def serving(model, **options):
    "The service in this process; yields (server, address)."
    limits = Limits(**{k: v for k, v in options.items() if k != 'access_log'})
    sock = _listen('127.0.0.1', 0)
    server = make_server(make_app(model, limits), limits, options.get('access_log', False))
    done = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started: await asyncio.sleep(.01)
    try: yield server, sock.getsockname()
    finally:
        server.should_exit = True
        await done


def test_half_a_head_is_closed(model):
    "Connections that never send a whole head: at once, byte by byte, or after a request that was answered."
    whole = b'GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n'
    async def half(address, *parts):
        reader, writer = await asyncio.open_connection(*address)
        for part in parts:
            if reader.at_eof() or writer.is_closing(): break
            writer.write(part)
            await asyncio.sleep(.02)
        try: got = await asyncio.wait_for(reader.read(), 20)           # to the connection's end
        except ConnectionError: got = b'cut off'
        writer.close()
        return got
    async def go():
        async with serving(model, max_seconds=.3) as (_, address):
            return await asyncio.gather(half(address), half(address, b'POST /sc'), half(address, *[b'x']*100), half(address, whole, *[b'G']*100))
    nothing, some, dripping, after = asyncio.run(go())
    assert nothing == some == b'' and dripping in (b'', b'cut off')
    assert after == b'cut off' or after.startswith(b'HTTP/1.1 200 OK') and after.count(b'HTTP/1.1') == 1


def test_a_client_that_never_reads(model, capsys):
    "When the service stops, it is given up without a traceback."
    async def go():
        async with serving(model, max_seconds=.5) as (server, address):
            with socket.create_connection(address) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                s.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True: s.send(b'GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n'*100)
                while not any(c.flow.write_paused for c in server.server_state.connections): await asyncio.sleep(.01)
                server.should_exit = True
                while server.servers and any(x.is_serving() for x in server.servers): await asyncio.sleep(.01)
                await asyncio.sleep(2.5)
    asyncio.run(go())
    said = capsys.readouterr().err
    assert 'Traceback' not in said, said


def test_nonsense_does_not_fill_the_log():
    few, out = FewLines(3), []
    for i in range(10):
        record = logging.LogRecord('uvicorn.error', logging.WARNING, '', 0, 'Invalid HTTP request received.', (), None)
        if few.filter(record): out.append(record.getMessage())
    assert len(out) == 3 and out[2] == 'Invalid HTTP request received. (3 times by now; no more of these are logged)'


def test_access_log(model, capsys):
    async def go():
        async with serving(model, access_log=True) as (_, (host, port)), httpx.AsyncClient() as client: await client.get(f'http://{host}:{port}/docs')
    asyncio.run(go())
    assert '"GET /docs HTTP/1.1" 200' in capsys.readouterr().out
