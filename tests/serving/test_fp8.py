"""Models in FP8, in bfloat16 otherwise, with the kernels interpreted."""

import pytest

from serving.server import INTERPRETED, KERNELS, Server
from serving.test_answers import answers, check_fused, check_truth
from serving.test_roads import number

NORMS = 5  # all but the last one, which the head reads
READERS = {"glm4_moe_fp8": 7, "qwen3_moe_fp8": 5}  # behind two of GLM's norms are experts and shared experts


@pytest.mark.parametrize("kind", READERS)
def test_the_layers_take_what_the_kernel_quantised(kind, tree, checkpoint, tmp_path):
    """Stock, fused and float64 say the same words, and the ranks how often a layer took the kernel's FP8."""
    experts = (tree / "fastdeploy/model_executor/layers/moe/fused_moe_triton_backend.py").read_text()
    in_fp8 = experts.partition("def python_op_fused_moe_kernel_paddle(")[2].partition("\nclass ")[0]
    if kind == "glm4_moe_fp8" and "noaux_tc" not in in_fp8:
        pytest.skip("this version's experts in FP8 choose by softmax, which is not GLM's way")
    folder = checkpoint(kind)
    with Server(tree, folder, tmp_path / "stock") as server:
        stock = answers(server)
    check_truth(folder, stock)
    with Server(tree, folder, tmp_path / "fused", serve=KERNELS, env=INTERPRETED) as server:
        assert answers(server) == stock
        check_fused(server, stock)
        assert f"{NORMS} norms in FP8, taken by {READERS[kind]} layers" in server.fusion_log()
        made, taken = (number(server, f'fd_fusion_fp8_total{{what="{what}"}}') for what in ("made", "taken"))
        assert made > 0 and made * READERS[kind] == taken * NORMS, (made, taken)
