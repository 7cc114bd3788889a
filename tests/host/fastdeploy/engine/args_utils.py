"""Arguments of the engine: a field of the dataclass and an argument of the same name."""

from dataclasses import asdict, dataclass, fields

from fastdeploy.config import (
    FDConfig,
    GraphOptimizationConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
)


@dataclass
class EngineArgs:
    model: str = ""
    port: int = 0
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_flashinfer_allreduce_fusion: bool = False
    num_gpu_blocks_override: int = None

    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model", default=EngineArgs.model)
        parser.add_argument("--port", type=int, default=EngineArgs.port)
        parser.add_argument("--tensor-parallel-size", type=int, default=EngineArgs.tensor_parallel_size)
        parser.add_argument("--data-parallel-size", type=int, default=EngineArgs.data_parallel_size)
        parser.add_argument("--enable-flashinfer-allreduce-fusion", action="store_true")
        parser.add_argument("--num-gpu-blocks-override", type=int, default=None)
        return parser

    @classmethod
    def from_cli_args(cls, args):
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)})

    def create_engine_config(self):
        everything = asdict(self)
        return FDConfig(
            ModelConfig(everything),
            ParallelConfig(everything),
            LoadConfig(everything),
            SpeculativeConfig(None),
            GraphOptimizationConfig(None),
        )
