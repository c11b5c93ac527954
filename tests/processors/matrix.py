"""The numerical tests again, as other processors and libraries would compute them: each setting a child process.

    python tests/processors/matrix.py                        every setting, every test marked numerical but long ones
    python tests/processors/matrix.py --only "MKL compatible" "2 threads" -- tests/measures -n 2
    python tests/processors/matrix.py --whole --times 3 -- -n auto      the README's second command, thrice under each

With --together one child process has all of the settings. One that this processor does not have, or does not heed, is
reported as such. docs/processors.md says more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTEL = "AS_INTEL"  # not a variable: MKL is told that the processor is Intel's, whose instructions it then uses
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "MKL SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL AVX-512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "MKL as on Intel, SSE4.2": {INTEL: "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL as on Intel, AVX2": {INTEL: "1", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "ATen default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATen AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "1 thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "MKL_DYNAMIC": "FALSE"},
    "4 threads": {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"},
}
PROBE = """
import json, torch
from d2surgery.merging.receipt import arithmetic
threads = torch.get_num_threads()
a = torch.ones(64, 64)
a @ a, a.bfloat16() @ a.bfloat16()
torch.set_num_threads(1)
print("PROBE" + json.dumps({"threads": threads, **arithmetic(torch.device("cpu"))}))
"""


def environment(setting: Mapping[str, str]) -> dict[str, str]:
    """This process's, without any setting of its own, and the setting's."""
    ours = {name for one in SETTINGS.values() for name in one}
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if INTEL in setting:
        variables["LD_PRELOAD"] = as_intel()
    return variables | {name: value for name, value in setting.items() if name != INTEL}


@cache
def as_intel() -> str:
    """A library that answers MKL's question whether the processor is Intel's with yes; needs a C compiler."""
    folder = Path(tempfile.mkdtemp(prefix="as-intel-"))
    code = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"
    (folder / "intel.c").write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "intel.so", folder / "intel.c"], check=True)
    return str(folder / "intel.so")


def missing(setting: Mapping[str, str]) -> str:
    """Why a setting cannot be tried here; nothing where it can."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    wants = "".join(setting.values()).lower()
    if "avx512" in wants and "avx512f" not in flags:
        return "this processor has no AVX-512"
    if INTEL in setting and "AuthenticAMD" not in flags:
        return "this processor is not AMD's"
    if INTEL in setting and not shutil.which("cc"):
        return "there is no C compiler"
    return ""


@cache
def used(name: str) -> dict[str, str]:
    """What torch says that it uses under a setting: ATen's instructions, MKL's and oneDNN's own words, threads, and
    the sha256 of how sums are rounded."""
    talking = environment(SETTINGS[name]) | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=talking, check=True)
    lines = done.stdout.splitlines()
    mkl = next((line for line in lines if line.startswith("MKL_VERBOSE oneMKL")), "")
    dnn = next((line for line in lines if ",isa:" in line), "")
    probe = json.loads(next(line for line in lines if line.startswith("PROBE")).removeprefix("PROBE"))
    words = mkl.partition("64 architecture ")[2].partition(", Lnx")[0]
    return {"mkl": words, "onednn": dnn.partition(",isa:")[2], **{key: str(value) for key, value in probe.items()}}


def settings(names: list[str]) -> Iterator[tuple[str, str]]:
    """Every setting that can be tried, with what it changes; those that cannot are said and left out."""
    for name in names:
        reason = missing(SETTINGS[name])
        if reason:
            print(f"{name}: not tried, {reason}", flush=True)
            continue
        now, usual = used(name), used("as it is")
        changed = [f"{key} {now[key]}" for key in now if now[key] != usual[key]]
        yield name, ", ".join(changed) or ("" if name == "as it is" else "computes as it is")


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, tests = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--together", action="store_true", help="all of them at once")
    parser.add_argument("--whole", action="store_true", help="every test but long ones, not only the numerical")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="in a row")
    options = parser.parse_args(own)
    chosen = options.only
    if options.together:
        chosen = [" + ".join(chosen)]
        SETTINGS[chosen[0]] = {name: value for one in options.only for name, value in SETTINGS[one].items()}
    print("as it is:", used("as it is"), flush=True)
    some = ("-p", "no:cacheprovider") if options.whole else ("-p", "no:cacheprovider", "-m", "numerical and not long")
    command = [sys.executable, "-m", "pytest", "-q", *some, *tests]
    failed = []
    for name, changes in (one for one in settings(chosen) for _ in range(options.times)):
        began = time.monotonic()
        done = subprocess.run(command, env=environment(SETTINGS[name]), cwd=ROOT, capture_output=True, text=True)
        failed += [name] * (done.returncode != 0)
        last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-200:]]
        print(f"{name} ({changes}): {last[0]} [{time.monotonic() - began:.0f} s]", flush=True)
        if done.returncode:
            print(done.stdout[-5000:], flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
