"""One thread for each worker, nothing from the network, no window: as in `make test`."""

import os

for name, value in {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(name, value)
