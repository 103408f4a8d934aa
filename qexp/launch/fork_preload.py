"""Imported by the process that jobs are forked from (see jobs.py) when it starts, and by nothing else.

Whatever a job would import and not change is imported here, once. No thread may be started, nor anything computed with
torch: a forked process has none of its parent's threads, and waits for those of OpenMP for ever.
"""

import gc

from qexp.system import processes

processes.end_with_parent()
processes.ignore_terminal()

import torch  # noqa: E402
import torch.utils.serialization.config  # noqa: E402
from PIL import Image  # noqa: E402

from qexp import __main__  # noqa: E402, F401
from qexp.launch import job_process  # noqa: E402, F401
from qexp.models import architectures  # noqa: E402, F401
from qexp.pipeline import run, run_files  # noqa: E402, F401
from qexp.report import charts  # noqa: E402, F401

# One answer for all jobs of a sweep, of the code that they run.
run_files.git_sha()
# What libraries look up once, when they are first used.
Image.init()
torch.overrides.get_overridable_functions()
# What is here for good is not looked through again by every job's garbage collector, and stays shared memory.
gc.collect()
gc.freeze()
