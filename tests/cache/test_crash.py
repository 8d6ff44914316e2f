"""A bug ends the daemon instead of leaving it half wrong."""

import subprocess
import sys


def test_an_unexpected_exception_in_the_loop_ends_the_process_and_is_logged() -> None:
    script = (
        "import asyncio, logging\n"
        "from forebay_cache.service import daemon\n"
        "logging.basicConfig()\n"
        "def bug():\n"
        "    assert False, 'the invariant'\n"
        "async def main():\n"
        "    loop = asyncio.get_running_loop()\n"
        "    loop.set_exception_handler(daemon._crash)\n"
        "    loop.call_soon(bug)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "the daemon ends" in done.stderr and "AssertionError: the invariant" in done.stderr
