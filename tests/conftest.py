"""One thread per process: the tensors of tests are small, and threads that wait for one another cost more."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the subprocesses that tests start
torch.set_num_threads(1)
