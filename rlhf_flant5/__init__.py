"Reward models on FLAN-T5. Importing the package is instant: a model comes with PyTorch when it is asked for."
import os, sys
from types import ModuleType

# nothing phones home: these are read when the hub's client, `datasets` and the trackers are imported;
# whoever sets them decides
_SILENT = dict(HF_HUB_DISABLE_TELEMETRY='1', HF_UPDATE_DOWNLOAD_COUNTS='0',
               MLFLOW_DISABLE_TELEMETRY='true', WANDB_ERROR_REPORTING='false')
for _name, _value in _SILENT.items(): os.environ.setdefault(_name, _value)

__version__ = "0.1.0"


def __getattr__(name):
    if name != 'RewardModel': raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .use.explain import RewardModel     # with all its methods
    return RewardModel


def __dir__(): return [*globals(), 'RewardModel', 'train']


class _Package(ModuleType):
    "`train` is the function, also when the program of this name, a module of the package, has been imported."
    @property
    def train(self):
        from .use.python import train
        return train

    @train.setter
    def train(self, program): pass      # what Python does with a module when it is imported


sys.modules[__name__].__class__ = _Package
