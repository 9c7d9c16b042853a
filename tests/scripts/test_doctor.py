import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_doctor_says_what_is_used_and_imports_no_cuda_package():
    code = (
        "import sys, scripts.doctor; code = scripts.doctor.main();"
        "assert not {'mamba_ssm', 'causal_conv1d', 'triton'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for word in ("torch", "mamba-ssm", "a run here uses: cpu", "attention", "m2rnn", "mamba2"):
        assert word in done.stdout
