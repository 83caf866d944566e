"""`make bench`: the ops on this CPU, the kernels and whole models on the GPU if there is one, then the plots of all results."""

import subprocess
import sys

import torch

ON_GPU = ["kernels", "long_conv", "selective_scan", "decode", "models", "hyena_decode", "hyena_training", "prefill"]

# Each in a process of its own: none inherits the memory or the compiled kernels of another.
for script in ["ops", "hybrid", *ON_GPU * torch.cuda.is_available(), "roofline"]:
    subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], check=True)
