import pytest

pytest.importorskip("triton", reason="triton is made for Linux only")

from tests.kernels.triton import interpreted  # noqa: F401
