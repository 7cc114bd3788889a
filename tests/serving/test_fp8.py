"""A model in FP8, in bfloat16 otherwise: GLM-4.5-Air's structure, with the kernels interpreted."""

from serving.server import INTERPRETED, KERNELS, Server
from serving.test_answers import answers, check_fused, check_truth
from serving.test_roads import number

NORMS, LAYERS = 5, 7  # all norms but the last; behind two of them are experts and shared experts


def test_the_layers_take_what_the_kernel_quantised(tree, checkpoint, tmp_path):
    """Stock, fused and float64 say the same words, and the ranks how often a layer took the kernel's FP8."""
    folder = checkpoint("glm4_moe_fp8")
    with Server(tree, folder, tmp_path / "stock") as server:
        stock = answers(server)
    check_truth(folder, stock)
    with Server(tree, folder, tmp_path / "fused", serve=KERNELS, env=INTERPRETED) as server:
        assert answers(server) == stock
        check_fused(server, stock)
        assert f"{NORMS} norms in FP8, taken by {LAYERS} layers" in server.fusion_log()
        made, taken = (number(server, f'fd_fusion_fp8_total{{what="{what}"}}') for what in ("made", "taken"))
        assert made > 0 and made * LAYERS == taken * NORMS, (made, taken)
