"""Makes the `tests` package of a Transformers checkout importable; without one there is nothing to collect here."""

import os
import sys

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
MARKERS = """generate slow torch_compile_test torch_export_test flash_attn_test flash_attn_3_test flash_attn_4_test
all_flash_attn_test is_pipeline_test accelerate_tests training_ci tensor_parallel_ci fsdp_ci is_fsdp_test
executorch_export_test onnx_export_test order timeout is_tensor_parallel_test
is_expert_parallel_test is_training_test is_staging_test"""

collect_ignore = [] if CHECKOUT else ["test_families.py"]
if CHECKOUT:
    sys.path.insert(0, os.path.abspath(CHECKOUT))


def pytest_configure(config):
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: a marker of Transformers' tests")
