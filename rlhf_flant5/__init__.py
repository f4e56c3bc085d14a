"Reward models on FLAN-T5. Importing the package is instant: a model comes with PyTorch when it is asked for."
import os

# nothing phones home: these are read when the hub's client and `datasets` are imported; whoever sets them decides
for _name, _value in dict(HF_HUB_DISABLE_TELEMETRY='1', HF_UPDATE_DOWNLOAD_COUNTS='0').items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"


def __getattr__(name):
    if name != 'RewardModel': raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .use.explain import RewardModel     # with all its methods
    return RewardModel


def __dir__(): return [*globals(), 'RewardModel']
