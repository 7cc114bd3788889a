"""All-reduce + residual + RMSNorm: the kernel, its plan, how it waits, packs and polls."""
