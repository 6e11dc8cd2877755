"""Faults in gradreg_optim/zero."""

TESTS = ["tests/sharded/test_zero.py", "tests/sharded/test_zero_engines.py"]
STORAGE, GATHERED, STAGE_3, ENGINES, OPTIMIZER = (
    f"gradreg_optim/zero/{name}.py" for name in ("storage", "gathered", "stage3", "engines", "optimizer")
)
BF16, OFFLOAD, ONE_TENSOR, THREE = (
    f"tests/sharded/test_zero.py::test_{name}"
    for name in ("bf16_optimizer", "offload", "weights_and_masters_in_one_tensor", "three_ranks")
)
INTERRUPT, OVERFLOW, COUNTS, CLOSURES, RESUMES = (
    f"tests/sharded/test_zero_engines.py::test_{name}"
    for name in (
        "interrupt_in_the_second_pass",
        "overflow_skips_the_step",
        "counts_like_a_plain_engine",
        "refuses_other_closures",
        "resumes_from_the_engine_checkpoint",
    )
)
MUTANTS = [
    ("the slice of a fragment begins with the partition", STORAGE,
     "narrow(0, self.start, self.size)", "narrow(0, 0, self.size)"),
    ("masters are written", STORAGE,
     "for flat in (weights, masters))", "for flat in (masters, masters))"),
    ("θ' is written from rounded weights instead of masters", STORAGE,
     "for flat in (weights, masters))", "for flat in (weights, weights))"),
    ("sums are not completed over ranks", STORAGE,
     "dist.all_reduce(total, group=self.zero.dp_process_group)", "pass"),
    ("g1 is not copied back into the engine's buffers", STORAGE,
     "            gradient.copy_(g1)\n\n    # Common", "            pass\n\n    # Common", INTERRUPT),
    ("the engine's dict of g1 is not put back", STORAGE,
     "self.zero.averaged_gradients.update(self._averaged)", "pass", INTERRUPT),
    ("excluded parameters get g2", STORAGE,
     "if group is None:\n                gradient.copy_(g1)", "if group is None:\n                pass"),
    ("exclusion is ignored", STORAGE,
     " and id(fragment.parameter) not in left_out", ""),
    ("the loss scale is forgotten", STORAGE,
     'return float(getattr(self.zero, "loss_scale", 1.0))', "return 1.0"),
    ("an overflow of the second pass is taken back", STORAGE,
     "return bool(self.engine.fp16_enabled())", "return False", OVERFLOW),
    ("the engine clips by the norms of g2", STORAGE,
     "self.zero.norm_for_param_grads = norms", "pass", OFFLOAD),
    ("after an exception the weights stay at θ'", STORAGE,
     "            self._rescue()", "            pass", INTERRUPT),
    ("weights are written and not gathered", GATHERED,
     "self._gather(getattr(self.zero, self.WEIGHTS), self._writable())", "return"),
    ("g1 is left where the second pass accumulates", GATHERED,
     "self.zero.averaged_gradients[index] = self.zero.all_grad_tensors[index] = None", "pass"),
    ("a parameter that a partition cuts keeps its beginning", GATHERED,
     "size = min(parameter.numel() - skipped, ", "size = min(parameter.numel(), "),
    ("BF16_Optimizer clips by a gradient that is combined on one rank", GATHERED,
     "        self._gather(self.zero.fp32_groups_gradients_flat, self.zero.fp32_groups_gradient_flat_partition)\n",
     "", BF16),
    ("BF16_Optimizer's slice begins with the group", GATHERED,
     "Fragment(parameter, index, index, start - first, end - start)",
     "Fragment(parameter, index, index, offset % size, end - start)", BF16),
    ("BF16_Optimizer leaves gradients out of its norm", GATHERED,
     "[True] * len(group)", "[False] * len(group)", BF16),
    ("stage 3 restores what is gathered and not its own slices", STAGE_3,
     "self.zero.fp16_partitioned_groups_flat[index].copy_(master)", "pass", INTERRUPT),
    ("stage 3 takes all for one group", STAGE_3,
     "Fragment(parameter, zero.sub_group_to_group_id[index], index, start, size)",
     "Fragment(parameter, 0, index, start, size)", THREE),
    ("gathered parameters are not released before they are written", STAGE_3,
     "        self.zero._partition_all_parameters()\n        flat = ", "        flat = "),
    ("the padding of the last rank counts", STAGE_3,
     "size = min(slice_size, parameter.ds_numel - rank * slice_size)", "size = slice_size", THREE),
    ("weights that are their own masters are written", STAGE_3,
     "if flat[index].data_ptr() == master.data_ptr():", "if False:", ONE_TENSOR),
    ("micro-steps count further passes", ENGINES,
     "            engine.micro_steps = end\n            timer", "            timer", COUNTS),
    ("the throughput timer counts further passes", ENGINES,
     "            timer.update(before)\n", "", COUNTS),
    ("a window too many is accepted", ENGINES,
     "if len(held) != 1:", "if not held:", CLOSURES),
    ("after an overflow the weights stay at θ'", OPTIMIZER,
     "self._storage.restore()", "pass", OVERFLOW),
    ("the step is not counted", OPTIMIZER,
     "self._storage.is_moved = False\n        self._advance()", "self._storage.is_moved = False", RESUMES),
]  # fmt: skip
