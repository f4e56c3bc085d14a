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
from rlhf_flant5.serve import listen, main, make_server
from rlhf_flant5.use.gate import FewLines, host_is_allowed
from rlhf_flant5.use.limits import Limits
from rlhf_flant5.use.requests import request_kinds
from rlhf_flant5.use.service import ERRORS, make_app
from rlhf_flant5.data.toy import toy_pairs

pairs = toy_pairs(150, seed=4)
texts = [*dict.fromkeys(pairs['chosen'][:] + pairs['rejected'][:])][:250]


@pytest.fixture(scope='module')
def model(): return build('full_attention_pooling')


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve')/'model'
    model.save_pretrained(folder, model.tokenizer, max_tokens=128, temperature=2.)
    return folder


def start(folder, *options):
    "The program on a free port, and its address."
    command = [sys.executable, '-m', 'rlhf_flant5.serve', str(folder), '--port', '0', *options]
    env = os.environ | {'PYTHONPATH': str(root)}
    p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = p.stdout.readline().split()[-1].removesuffix('/docs')
    return p, url


@pytest.fixture(scope='module')
def service(folder):
    p, url = start(folder, '--max-bytes', '100000', '--max-seconds', '20')
    assert url.startswith('http://127.0.0.1:'), p.stderr.read()
    yield p, url
    if p.poll() is None: p.kill()
    p.communicate()


def ask(url, *texts): return httpx.post(url + '/score', json=dict(texts=[*texts]), timeout=30)


def test_200_at_once(service, model):
    "Each answer is that of its own text, though others hang up in between."
    _, url = service
    want, stays = model.score(texts), np.arange(250) % 5 != 4                      # every fifth client goes at once
    async def ask_one(client, i):
        timeout = 30 if stays[i] else .001
        try: r = await client.post('/score', json=dict(texts=[texts[i]]), timeout=timeout)
        except httpx.TimeoutException: return np.nan
        assert r.status_code == 200
        return r.json()['rewards'][0]
    async def ask_all():
        limits = httpx.Limits(max_connections=250)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            return np.array(await asyncio.gather(*(ask_one(client, i) for i in range(250))))
    got = asyncio.run(ask_all())
    assert stays.sum() == 200
    assert np.abs(got - want)[stays].max() < 1e-5 < want.std()
    health = httpx.get(url + '/health').json()
    assert health['batches'] < health['scored']/2 and health['status'] == 'ok'


def test_compare_with_messages(service, model):
    _, url = service
    prompt = [dict(role='system', content='Be brief.'), dict(role='user', content='Who?')]
    got = httpx.post(url + '/compare', json=dict(prompt=prompt, a='I do not know.', b='It is a bird.')).json()
    want = model.compare((prompt, 'I do not know.'), (prompt, 'It is a bird.'))
    assert abs(got['probability'] - want) < 1e-5 and got['temperature'] == 2


# ---- clients that are not what they say

HEAD = b'POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'

def connect(url, **kwargs): return socket.create_connection(url.removeprefix('http://').split(':'), **kwargs)


def raw(url, data, wait=5):
    "Bytes over a connection of our own; the status that comes back."
    with connect(url, timeout=wait) as s:
        s.sendall(data)
        return int(s.recv(4096).split()[1])


CHUNK = b'%x\r\n%s\r\n' % (50_000, b'x'*50_000)

@pytest.mark.parametrize('data, status', [
    pytest.param(HEAD + b'Transfer-Encoding: chunked\r\n\r\n' + CHUNK*3, 413, id='no length, no end'),
    pytest.param(HEAD + b'Content-Length: 99999999999\r\n\r\n' + b'x'*100_001, 413, id='too long'),
    pytest.param(HEAD + b'Content-Length: 3\r\n\r\n{}[', 422, id='no JSON'),
    pytest.param(HEAD.replace(b'localhost', b'evil.example') + b'Content-Length: 2\r\n\r\n{}', 400, id='another name'),
    pytest.param(HEAD + b'Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 400, id='two lengths')])
def test_framing(service, data, status):
    _, url = service
    assert raw(url, data) == status
    assert ask(url, texts[0]).status_code == 200


def test_a_name_that_a_web_page_brought_along(service):
    _, url = service
    got = httpx.post(url + '/score', json={}, headers={'Host': 'evil.example', 'Connection': 'close'})
    assert got.status_code == 400 and 'Host must be one of' in got.json()['error']


def test_clients_that_send_half_and_leave(service):
    _, url = service
    for _ in range(20):
        with connect(url) as s: s.sendall(HEAD + b'Content-Length: 500\r\n\r\n{"texts"')
    assert ask(url, texts[0]).status_code == 200


def test_a_key_that_two_readers_read_in_two_ways(service):
    _, url = service
    json_type = {'Content-Type': 'application/json'}
    twice = httpx.post(url + '/score', content='{"texts": ["a"], "texts": ["b"]}', headers=json_type)
    assert twice.status_code == 422 and "'texts' stands twice" in twice.json()['error']


def test_stops_well_while_it_works(service, model):
    p, url = service
    async def ask_and_stop():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            body = dict(texts=texts[:200])
            asked = [asyncio.ensure_future(client.post('/score', json=body)) for _ in range(5)]
            while (await client.get('/health')).json()['waiting'] == 0: await asyncio.sleep(0)
            p.send_signal(signal.SIGTERM)
            return [r.json()['rewards'] for r in await asyncio.gather(*asked)]
    want = model.score(texts[:200])
    for got in asyncio.run(ask_and_stop()): assert np.abs(got - want).max() < 1e-5
    assert p.wait(20) == 0 and p.stderr.read() == ''
    with pytest.raises(httpx.ConnectError): ask(url, texts[0])


# ---- the program

@pytest.mark.parametrize('args, says', [
    pytest.param(['nowhere/at/all'], 'no such folder', id='no folder'),
    pytest.param(['EMPTY'], 'no config.json', id='an empty folder'),
    pytest.param(['x', '--max-texts', '0'], 'must be above 0', id='a limit of 0')])
def test_program_refuses_in_one_line(tmp_path, capsys, args, says):
    assert main([str(tmp_path) if arg == 'EMPTY' else arg for arg in args]) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and says in said and said.count('\n') == 1


def test_a_port_that_cannot_be_had():
    with socket.create_server(('127.0.0.1', 0)) as s:
        taken = s.getsockname()[1]
        with pytest.raises(ConfigError, match='cannot listen there'): listen('127.0.0.1', taken)
    with pytest.raises(ConfigError, match='cannot listen there'): listen('127.0.0.1', 99999)


@pytest.mark.parametrize('names, allowed', [([b'localhost:8'], True), ([b'localhost', b'evil'], False), ([], False)])
def test_two_names_are_none(names, allowed):
    assert host_is_allowed([(b'host', name) for name in names], ['localhost']) == allowed


@pytest.mark.parametrize('e, code, says', [
    pytest.param(KeyboardInterrupt(), 75, 'interrupted (SIGINT)\n', id='interrupted'),
    pytest.param(PermissionError(13, 'Permission denied', 'x/config.json'), 1,
                 'failed: x/config.json: Permission denied\n', id='refused')])
def test_interrupted_or_refused_while_it_loads(monkeypatch, capsys, e, code, says):
    def load(*_): raise e
    monkeypatch.setattr('rlhf_flant5.serve.load_model', load)
    assert main(['x']) == code
    assert capsys.readouterr().err == says


def test_ipv6_loopback_checks_names_too(folder):
    try: socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    except OSError: pytest.skip('no IPv6 here')
    p, url = start(folder, '--host', '::1')
    try:
        assert httpx.get(url + '/health').status_code == 200
        assert httpx.get(url + '/health', headers=dict(Host='evil.example')).status_code == 400
    finally:
        p.terminate()
        p.communicate(timeout=30)


def test_without_the_extra(tmp_path):
    (tmp_path/'fastapi.py').write_text('raise ImportError')
    res = program('rlhf_flant5.serve', 'x', env={'PYTHONPATH': f'{tmp_path}:{root}'})
    assert res.returncode == 2
    assert res.stderr == "error: serving needs FastAPI and uvicorn; pip install 'rlhf_flant5[serve]'\n"


# ---- what is asked and answered

@pytest.mark.parametrize('asked, n_faults', [
    pytest.param(dict(texts=[1]*10**5), 1, id='numbers'),
    pytest.param(dict(texts=['a']*10**5), 1, id='too many texts'),
    pytest.param(dict(prompts=[1]*10**5), 2, id='prompts that are numbers'),
    pytest.param(dict(prompts=[[{}]*10**5]), 3, id='a prompt of empty messages'),
    pytest.param(dict(messages=[{}]*10**5), 2, id='empty messages')])
def test_a_list_is_read_to_its_first_fault(asked, n_faults):
    "A request of a million faults within all limits took seconds in which nobody else was answered."
    ScoreRequest, *_ = request_kinds(256)
    with pytest.raises(ValidationError) as e: ScoreRequest.model_validate(asked)
    assert e.value.error_count() <= n_faults


def ask_app(model, path, limits=Limits(), **body):
    with TestClient(make_app(model, limits)) as client: return client.post(path, json=body)


PROMPT, RESPONSES = 'What kind of animal is a robin?', ['It is a fish.', 'It is a bird.', 'I do not know.']

def test_rank(model):
    got, want = ask_app(model, '/rank', prompt=PROMPT, responses=RESPONSES).json()['ranking'], model.rank(PROMPT, RESPONSES)
    assert [(r['index'], r['response']) for r in got] == [*zip(want['index'], want.response)]
    assert [r['share'] for r in got] == pytest.approx(want.share)


def test_a_single_prompt(model):
    got = ask_app(model, '/score', prompt=PROMPT, responses=RESPONSES).json()['rewards']
    assert got == pytest.approx(model.score(PROMPT, RESPONSES), abs=1e-5)
    messages = [dict(role='user', content=PROMPT), dict(role='assistant', content=RESPONSES[1])]
    got = ask_app(model, '/score', messages=messages).json()['rewards']
    assert got == pytest.approx([model.score(messages)], abs=1e-5)


def test_errors_in_words_of_http(model):
    many = ask_app(model, '/score', Limits(max_texts=3), texts=['a']*4)
    assert (many.status_code, many.json()['error']) == (422, 'texts: 3 at most; send fewer at a time')

    long = ask_app(model, '/score', prompt='Who?', response='It is a bird. '*60)
    error = long.json()['error']
    assert long.status_code == 422 and 'the model reads 128 at most' in error
    assert 'the server was started with --too-long error' in error and 'truncate_left' not in error

    some = ask_app(model, '/score', prompt='Who?').json()['error']
    forms = 'text; or texts; or messages; or prompt and response; or'
    assert some.startswith(f'the request has prompt; give {forms}')


def test_what_openapi_says_of_errors(model):
    with TestClient(make_app(model)) as client: said = client.get('/openapi.json').json()
    assert said['info']['version'] == rlhf_flant5.__version__ and 'HTTPValidationError' not in json.dumps(said)
    for path in ('/score', '/compare', '/rank'):
        answers = said['paths'][path]['post']['responses']
        assert {*answers} == {'200', *map(str, ERRORS)}
        schemas = [answers[str(status)]['content']['application/json']['schema'] for status in ERRORS]
        assert {schema['$ref'] for schema in schemas} == {'#/components/schemas/ErrorAnswer'}


def test_the_page_has_requests_that_run(model):
    with TestClient(make_app(model, Limits(max_texts=77))) as client:
        page = client.get('/').text
        asked = re.findall(r"curl -s testserver(/\w+) .* -d '(.*)'", page)
        headers = {'Content-Type': 'application/json'}
        statuses = {path: client.post(path, content=body, headers=headers).status_code for path, body in asked}
    assert '--max-texts<td>77<td>texts in a request' in page
    assert [*statuses.items()] == [('/score', 200), ('/compare', 200), ('/rank', 200)] and len(asked) == 3


def test_metrics_count_answers(model):
    with TestClient(make_app(model)) as client:
        for body in (dict(texts=texts[:2]), dict(texts=texts[2:5]), {}): client.post('/score', json=body)
        for i in range(3): client.get(f'/nowhere/{i}')
        lines = client.get('/metrics').text.splitlines()
    assert 'rlhf_flant5_requests_total{path="/score",status="200"} 2' in lines
    assert 'rlhf_flant5_requests_total{path="/score",status="422"} 1' in lines
    assert 'rlhf_flant5_requests_total{path="other",status="404"} 3' in lines
    assert 'rlhf_flant5_texts_total 5' in lines


# ---- the service in this process

@contextlib.asynccontextmanager
async def serving(model, access_log=False, **limits):
    "The service in this process; yields (server, address)."
    limits, sock = Limits(**limits), listen('127.0.0.1', 0)
    server = make_server(make_app(model, limits), limits, access_log)
    done = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started: await asyncio.sleep(.01)
    try: yield server, sock.getsockname()
    finally:
        server.should_exit = True
        await done


async def send_parts(address, *parts): # -> all that comes back
    reader, writer = await asyncio.open_connection(*address)
    for part in parts:
        if reader.at_eof() or writer.is_closing(): break
        writer.write(part)
        await asyncio.sleep(.02)
    try: got = await asyncio.wait_for(reader.read(), 20)           # to the connection's end
    except ConnectionError: got = b'cut off'
    writer.close()
    return got


def test_half_a_head_is_closed(model):
    "Connections that never send a whole head: at once, byte by byte, or after a request that was answered."
    whole = b'GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n'
    async def go():
        async with serving(model, max_seconds=.3) as (_, address):
            return await asyncio.gather(
                send_parts(address),
                send_parts(address, b'POST /sc'),
                send_parts(address, *[b'x']*100),
                send_parts(address, whole, *[b'G']*100))
    nothing, some, dripping, after = asyncio.run(go())
    assert nothing == some == b''
    assert dripping in (b'', b'cut off')
    assert after == b'cut off' or after.startswith(b'HTTP/1.1 200 OK') and after.count(b'HTTP/1.1') == 1


def send_until_full(s):
    "Ask again and again, until the connection takes no more, and read no answer."
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True: s.send(b'GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n'*100)


def test_a_client_that_never_reads(model, capsys):
    "When the service stops, it is given up without a traceback."
    async def go():
        async with serving(model, max_seconds=.5) as (server, address):
            with socket.create_connection(address) as s:
                send_until_full(s)
                while not any(c.flow.write_paused for c in server.server_state.connections): await asyncio.sleep(.01)
                server.should_exit = True
                while server.servers and any(x.is_serving() for x in server.servers): await asyncio.sleep(.01)
                await asyncio.sleep(2.5)
    asyncio.run(go())
    said = capsys.readouterr().err
    assert 'Traceback' not in said, said


def test_nonsense_does_not_fill_the_log():
    few, out = FewLines(3), []
    for _ in range(10):
        record = logging.LogRecord('uvicorn.error', logging.WARNING, '', 0, 'Invalid HTTP request received.', (), None)
        if few.filter(record): out.append(record.getMessage())
    assert len(out) == 3
    assert out[2] == 'Invalid HTTP request received. (3 times by now; no more of these are logged)'


def test_access_log(model, capsys):
    async def go():
        async with serving(model, access_log=True) as (_, (host, port)), httpx.AsyncClient() as client:
            await client.get(f'http://{host}:{port}/docs')
    asyncio.run(go())
    assert '"GET /docs HTTP/1.1" 200' in capsys.readouterr().out
