import os

# nothing phones home: these are read when the hub's client and `datasets` are imported; whoever sets them decides
for _name, _value in dict(HF_HUB_DISABLE_TELEMETRY='1', HF_UPDATE_DOWNLOAD_COUNTS='0').items(): os.environ.setdefault(_name, _value)

__version__ = "0.1.0"
