"What is written: whole or not at all, by whomever it is interrupted, and with the rights that the umask leaves."
import os, signal, stat
import pytest, torch
from safetensors.torch import load_file
from transformers import T5EncoderModel
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.training.checkpoint import save_weights
from rlhf_flant5.training.trackers import History
from rlhf_flant5.models.attention_pooled_encoder import RewardFromAttentionPooledEncoder
from rlhf_flant5.core.files import remove_leftovers
from rlhf_flant5.use.elsewhere import export_backbone
from rlhf_flant5.data.toy import toy_tokenizer, toy_transformer
from test_runs import full_disk


def toy_model(seed=0):
    torch.manual_seed(seed)
    backbone = Backbone(toy_transformer(cls=T5EncoderModel))
    settings = dict(pooling_output_dim=8, n_blocks_to_use=2, readout_additional_layers=[])
    return RewardFromAttentionPooledEncoder(backbone, **settings)


@pytest.fixture(scope='module')
def models(): return toy_model(), toy_model(1)


def rename_but(nth, instead):
    "`os.rename` that calls `instead` before the nth time."
    rename, calls = os.rename, iter(range(1, 100))
    def renamed(*args):
        if next(calls) == nth: instead()
        rename(*args)
    return renamed


def killed_at_rename(f, nth):
    "Call `f` in a process of its own that is killed when it is about to rename for the nth time."
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.rename = rename_but(nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
    try: f()
    finally: os._exit(1)


@pytest.mark.parametrize('nth', [1, 2], ids=['before the old one is set aside', 'before the new one is in its place'])
def test_a_kill_keeps_the_old_model(tmp_path, models, nth):
    """Whoever is killed while he saves over a model has the old one still,
    or gets it back with the next look at the folder."""
    old, new = models
    old.save_pretrained(tmp_path/'model', toy_tokenizer())
    before = (tmp_path/'model'/'model.safetensors').read_bytes()
    assert killed_at_rename(lambda: new.save_pretrained(tmp_path/'model', toy_tokenizer()), nth) == -signal.SIGKILL
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['model']
    assert (tmp_path/'model'/'model.safetensors').read_bytes() == before


def test_an_error_keeps_the_old_model(tmp_path, models, monkeypatch):
    "Also if it comes between the two renames; nothing is left beside the model."
    old, new = models
    old.save_pretrained(tmp_path/'model', toy_tokenizer())
    before = (tmp_path/'model'/'model.safetensors').read_bytes()
    def refuse(): raise OSError(30, 'Read-only file system')
    with monkeypatch.context() as m:
        m.setattr(os, 'rename', rename_but(2, refuse))
        with pytest.raises(OSError, match='Read-only'): new.save_pretrained(tmp_path/'model', toy_tokenizer())
    assert (tmp_path/'model'/'model.safetensors').read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['model']


@pytest.mark.parametrize('umask, file, folder', [
    pytest.param(0o022, 0o644, 0o755, id='all may read'),
    pytest.param(0o077, 0o600, 0o700, id='the owner alone'),
    pytest.param(0o002, 0o664, 0o775, id='the group may write')])
def test_rights_follow_the_umask(tmp_path, models, umask, file, folder):
    "Weights beside the rest: a model, a readout alone, a plain T5."
    old = os.umask(umask)
    try:
        models[0].save_pretrained(tmp_path/'model', toy_tokenizer())
        save_weights(models[0], tmp_path/'readout', {}, dict(a=torch.ones(2)))
        export_backbone(tmp_path/'model', tmp_path/'t5')
    finally: os.umask(old)
    folders = [tmp_path/name for name in ('model', 'readout', 't5')]
    own = [path for top in folders for path in (top, *top.rglob('*'))]
    assert sum(p.name == 'model.safetensors' for p in own) == 3
    rights = {(p.is_dir(), stat.S_IMODE(p.stat().st_mode)) for p in own}
    assert rights == {(True, folder), (False, file)}


def test_a_linked_file_keeps_its_bytes(tmp_path):
    "A checkpoint links the best model's files; a later best model does not write into them."
    save_weights(None, tmp_path/'best', {}, dict(a=torch.ones(2)))
    os.link(tmp_path/'best'/'model.safetensors', tmp_path/'kept')
    save_weights(None, tmp_path/'best', {}, dict(a=torch.zeros(2)))
    assert load_file(tmp_path/'kept')['a'].tolist() == [1, 1]


def test_history_is_rewound_whole(tmp_path):
    "Going back cuts what came later, or changes nothing if the disk refuses."
    history = History(tmp_path/'history.jsonl')
    for n in (10, 20, 30): history(n, {'validation/loss': 1/n})
    with open(history.path, 'a') as f: f.write('{"batch": 40, "validation/lo')
    before = history.path.read_text()
    with full_disk(), pytest.raises(OSError, match='File too large'): history.rewind(20)
    assert history.path.read_text() == before
    history.rewind(20)
    assert history.path.read_text() == ''.join(before.splitlines(True)[:2])
