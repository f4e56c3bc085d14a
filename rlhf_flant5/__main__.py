"`python -m rlhf_flant5`: the programs, a line each."
import sys
from .core.program import start

if __name__ == '__main__': sys.exit(start())
