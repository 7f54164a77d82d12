"""Mutants that survive, and why that is no gap in the tests: reasons with the names that the runner prints."""

_REASONS: dict[str, tuple[str, ...]] = {
    "A device that is the CPU anyway where there is no GPU; it shows where there is one.": (
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler._set_grid: torch.device(device).type == 'cuda' -> "
        "torch.device(device).type != 'cuda'",
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler._set_grid: 'cuda' -> 'cudaX'",
    ),
    "The start of Newton's method, which ends at the same root from anywhere in the cell and has steps to spare.": (
        "flow/interpolation.py: VariancePreserving.timestep_at: (angle - angles[index]) / (angles[index + 1] - "
        "angles[index]) -> (angle - angles[index]) * (angles[index + 1] - angles[index])",
        "flow/interpolation.py: VariancePreserving.timestep_at: angles[index + 1] - angles[index] -> angles[index "
        "+ 1] + angles[index]",
        "flow/interpolation.py: VariancePreserving.timestep_at: 10 -> 11",
        "flow/interpolation.py: VariancePreserving.timestep_at: 1 -> 2 (5)",
    ),
    "A knot belongs to the cells on both of its sides, and the cubic is continuous there.": (
        "flow/interpolation.py: VariancePreserving.timestep_at: torch.searchsorted(angles, angle, right=True) -> "
        "torch.searchsorted(angles, angle)",
        "flow/interpolation.py: VariancePreserving.timestep_at: True -> False",
    ),
    "Both halves of the path say the same at t = 1/2.": (
        "flow/prediction.py: DiffusionAsFlow.velocity: t >= 0.5 -> t > 0.5",
    ),
    "The bound of what counts as zero: anything between a rounding error and a real divisor would do.": (
        "flow/prediction.py: _check_divisor: divisor.abs() <= 4 * torch.finfo(divisor.dtype).eps -> divisor.abs() "
        "< 4 * torch.finfo(divisor.dtype).eps",
        "flow/prediction.py: _check_divisor: 4 -> 5",
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler.index_for_timestep: distance[index] <= 1e-06 * "
        "self.config['num_train_timesteps'] -> distance[index] < 1e-06 * self.config['num_train_timesteps']",
    ),
    "A bound that only rounding could pass, and by less than it allows.": (
        "flow/time_density.py: UShaped.sample: 1 -> 2 (2)",
    ),
    "The quicker way to an index that the slower one finds too; which was taken shows on a GPU, as time.": (
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler.index_for_timestep: timestep.ndim == 0 -> "
        "timestep.ndim != 0",
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler.index_for_timestep: 0 -> 1",
        "pipelines/scheduler.py: _share_memory: return one.dtype == other.dtype and one.untyped_storage()._cdata "
        "== other.untyped_storage()._cdata -> return None",
        "pipelines/scheduler.py: _share_memory: one.dtype == other.dtype -> one.dtype != other.dtype",
        "pipelines/scheduler.py: _share_memory: one.untyped_storage()._cdata == other.untyped_storage()._cdata -> "
        "one.untyped_storage()._cdata != other.untyped_storage()._cdata",
    ),
    "`timesteps` is a tensor of its own, so that its offset in memory is 0.": (
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler.index_for_timestep: timestep.storage_offset() - "
        "self.timesteps.storage_offset() -> timestep.storage_offset() + self.timesteps.storage_offset()",
    ),
    "A shift of 1 warps by nothing, bit for bit.": (
        "pipelines/scheduler.py: RectifiedFlowEulerScheduler.set_timesteps: 1 -> 0 (3)",
    ),
    "What is left out, or put in its place, is what Python does anyway.": (
        "data/manifest.py: first_difference: return None -> return None",
    ),
    "`argsort` gives whole numbers whatever it sorts; only an empty list has no numbers to tell their type.": (
        "data/dataset.py: JoinedTriplets.rows: torch.tensor([position for own in positions for position in own], "
        "dtype=torch.long) -> torch.tensor([position for own in positions for position in own])",
    ),
    "Any number that no block has says that none is read yet; of row groups, the first is asked for first.": (
        "data/prompts.py: StoredPrompts._settle: 1 -> 2",
        "data/prompts.py: ParquetPrompts.__init__: -1 -> 1",
        "data/prompts.py: ParquetPrompts.__init__: 1 -> 2",
    ),
    "Put between texts of which there is one at most.": ("data/prompts.py: ParquetPrompts.__init__: ' ' -> ' X'",),
    "A block that is too long has the same prompts at the same places.": (
        "data/prompts.py: ParquetPrompts._read: count - len(prompts) -> count + len(prompts)",
    ),
    "NumPy takes every negative length for the one that is left over.": ("data/shards.py: write_shard: 1 -> 2",),
    "One text without a revision in it is as good as another.": ("data/teacher.py: Teacher.provenance: '' -> 'X'",),
    "A value that every place is given another for.": ("data/dataset.py: TripletDataset.rows: '' -> 'X'",),
    "`str.format` leaves out what the text does not ask for.": (
        "data/dataset.py: TripletDataset._check_orientation: 2 -> 3",
    ),
    "A bound that numbers in floating point meet with probability zero.": (
        "data/dataset.py: _is_unit_white: abs(std ** 2 - 1) <= variance_bound -> abs(std ** 2 - 1) < variance_bound",
        "data/dataset.py: _is_unit_white: abs(autocorrelation) <= correlation_bound -> abs(autocorrelation) < "
        "correlation_bound",
    ),
    "One pair of neighbours has a correlation of 1 at most, which either bound lets pass.": (
        "data/dataset.py: _is_unit_white: 1 -> 2",
    ),
}
EXPLAINED = {name: reason for reason, names in _REASONS.items() for name in names}
