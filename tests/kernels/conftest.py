"""interpreted.py is for a process that has chosen Triton's interpreter; test_fused.py starts one."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted.py"]
