"The service in a process of its own, asked over real connections: many at once, by clients that are slow, false or gone, and stopped while it works."
import asyncio, os, signal, socket, subprocess, sys
import httpx
import numpy as np
import pytest
from conftest import program, root
from test_score import build
from rlhf_flant5.config import ConfigError
from rlhf_flant5.serve import _listen, _named, main
from rlhf_flant5.toy import toy_pairs

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


def test_two_names_are_none(): assert [_named([(b'host', v) for v in names], ['localhost']) for names in ([b'localhost:8'], [b'localhost', b'evil'], [])] == [True, False, False]


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
