"""Kernels of the graph are compiled by the workers while Inductor still writes the module."""

from __future__ import annotations

import pytest
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from poetx_compile.compile.lowerings.early import compiled_early

SOURCE = "\nimport triton\n\n@triton.jit\ndef rotate(x):\n    pass\n"
BODY = f"async_compile.triton('rotate', '''{SOURCE}''', device_str='cuda')\n"


@pytest.mark.parametrize("ready", [True, False])
def test_what_the_module_will_ask_for_is_sent_when_it_is_defined(monkeypatch, ready) -> None:
    sent, defined = [], []

    class Asked(AsyncCompile):
        def triton(self, *args, **kwargs):
            sent.append((args, kwargs))

    def define_kernel(wrapper, *args, **kwargs):
        defined.append((args, kwargs, len(sent)))

    def define_user_defined_triton_kernel(wrapper, name):
        wrapper.define_kernel(name, BODY, "# metadata", gpu=True)
        return name

    monkeypatch.setattr(AsyncCompile, "triton", Asked.triton)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: ready))
    monkeypatch.setattr(PythonWrapperCodegen, "define_kernel", define_kernel)
    define = define_user_defined_triton_kernel
    monkeypatch.setattr(PythonWrapperCodegen, define.__name__, define)
    wrapper = object.__new__(PythonWrapperCodegen)
    with compiled_early():
        assert wrapper.define_user_defined_triton_kernel("rotate_0") == "rotate_0"
        wrapper.define_kernel("one of Inductor's", BODY)
    calls = 1 if ready else 0
    assert [(args, kwargs) for args, kwargs, _ in defined] == [
        (("rotate_0", BODY, "# metadata"), {"gpu": True}),
        (("one of Inductor's", BODY), {}),
    ]
    assert len(sent) == defined[0][2] == calls
    exec(BODY, {"async_compile": Asked()})  # the module, when it is loaded
    assert sent == sent[:1] * (calls + 1)
    wrapper.define_user_defined_triton_kernel("rotate_1")
    assert len(sent) == calls + 1, "the patch is scoped"
