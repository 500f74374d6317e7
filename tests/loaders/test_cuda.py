"""The same on a GPU: what is loaded computes what it is, and generates through CUDA graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, MixtralConfig, MixtralForCausalLM

from spqr_format.errors import SpqrError
from spqr_loaders import SpqrFormatConfig
from spqr_loaders.experts import SplitExperts

from .conftest import IDS, layers, position_out_of_range

pytestmark = pytest.mark.gpu


matvec = pytest.importorskip("spqr_kernels.matvec", reason="no Triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loaded_on_the_gpu(tiny, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=dtype, device_map="cuda")
    runtime = SpqrFormatConfig(dequantize=True)
    dense = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=dtype, device_map="cuda", quantization_config=runtime)
    for name, layer in layers(model).items():
        assert layer.weight.is_cuda
        expected = tiny.dense[f"{name}.weight"].to(dtype)
        assert torch.equal(dense.get_submodule(name).weight.cpu(), expected), name
    ids = IDS.cuda()
    with torch.no_grad():
        error = (model(ids).logits - dense(ids).logits).float().norm() / dense(ids).logits.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    if dtype == torch.float32:
        kwargs = {"max_new_tokens": 32, "do_sample": False}
        assert torch.equal(model.generate(ids, **kwargs), dense.generate(ids, **kwargs))


def test_static_cache_compiles_as_the_first_thing(tiny):
    # No product has run before: what a kernel keeps between calls must not lie in the memory of the CUDA graphs.
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16, device_map="cuda")
    kwargs = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
    first = model.generate(IDS.cuda(), **kwargs)
    assert torch.equal(first, model.generate(IDS.cuda(), **kwargs))


def test_static_cache_compiles(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16, device_map="cuda")
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    eager = model.generate(IDS.cuda(), **kwargs)
    compiled = model.generate(IDS.cuda(), cache_implementation="static", **kwargs)
    # Half precision may tie: the first tokens must agree, and nothing may be garbage after that.
    assert torch.equal(eager[:, : IDS.shape[1] + 4], compiled[:, : IDS.shape[1] + 4])


def test_static_cache_compiles_to_kernels_that_begin_early(tiny):
    """Inductor's begin before ours have ended, as ours do before its: the same tokens as where they do not."""
    made = []
    for compile_config in (CompileConfig(), None):  # as transformers has it, as we do
        torch._dynamo.reset()
        model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16, device_map="cuda")
        kwargs = {"max_new_tokens": 48, "do_sample": False, "cache_implementation": "static", "compile_config": compile_config}
        made += [model.generate(IDS.cuda(), **kwargs) for _ in range(3)]
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_broken_payload_never_reaches_the_gpu_kernels(copied):
    position_out_of_range(copied)
    with pytest.raises(SpqrError, match="E304"):
        AutoModelForCausalLM.from_pretrained(copied, device_map="cuda")
    assert torch.ones(3, device="cuda").sum() == 3  # no illegal access has happened


def test_quantized_while_loading_on_the_gpu(tiny_llama):
    config = SpqrFormatConfig(weight_bits=4, outlier_share=0.001)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16, device_map="cuda", quantization_config=config)
    assert all(layer.weight.is_cuda for layer in layers(model).values())
    assert model(IDS.cuda()).logits.isfinite().all()


@torch.no_grad()  # what a gradient would need stays alive
def test_moving_a_model_frees_what_it_leaves_and_holds_nothing_twice(tiny):
    square = torch.ones(64, 64, dtype=torch.float16, device="cuda")
    square @ square  # cuBLAS takes memory with its first product, and keeps it
    gc.collect()  # of what other tests have left
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16, device_map={"": "cuda"})
    loaded = torch.cuda.memory_allocated() - before
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    assert loaded < sum(t.nbytes for t in tensors) + 1024 * len(tensors)  # each allocation may waste half a KB
    del tensors  # parameters may become other objects
    target = model(IDS.cuda()).logits
    model.to("cpu")
    gc.collect()
    assert all(not tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before < loaded / 10 + target.nbytes
    assert all(layer.is_joined() and not layer.joined.is_cuda for layer in layers(model).values())
    model.to("cuda")
    assert torch.cuda.memory_allocated() - before < 1.1 * loaded + target.nbytes
    assert all(layer.is_joined() and layer.joined.is_cuda for layer in layers(model).values())
    assert torch.equal(model(IDS.cuda()).logits, target)
    arrived = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16).to("cuda")
    assert all(layer.is_joined() for layer in layers(arrived).values())


def test_experts_generate_without_asking_the_host(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    how = SpqrFormatConfig(weight_bits=4, outlier_share=0.01)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, device_map="cuda", quantization_config=how)
    split = [module for module in model.modules() if isinstance(module, SplitExperts)]
    assert all(module.pooled for module in split)
    ids = IDS.cuda() % 64
    with torch.no_grad():
        together = model(ids).logits
        for module in split:
            module.pooled = False
        torch.testing.assert_close(together, model(ids).logits, rtol=2e-2, atol=2e-3)
        for module in split:
            module.pooled = True
        for rows in (3, 40):  # pairs, and blocks
            x, weights = torch.randn(rows, 256).half().cuda(), torch.rand(rows, 2).cuda()
            index = torch.tensor([[0, 1], [2, 3], [1, 3]]).cuda().repeat(14, 1)[:rows]
            expected = split[0](x, index, weights)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                result = split[0](x, index, weights)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(result, expected)
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    eager = model.generate(ids, **kwargs)
    compiled = model.generate(ids, cache_implementation="static", **kwargs)
    assert torch.equal(eager[:, : ids.shape[1] + 4], compiled[:, : ids.shape[1] + 4])


def test_a_model_that_is_not_on_the_current_device(tiny):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16, device_map={"": 1})
    here = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float16, device_map={"": 0})
    assert torch.cuda.current_device() == 0
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1]):
            assert torch.equal(model(ids.to("cuda:1")).logits.cpu(), here(ids.cuda()).logits.cpu())
