"""Mutants that survive, and why that is no gap in the tests: reasons with the names that the runner prints."""

_REASONS: dict[str, tuple[str, ...]] = {
    "A device that is the CPU anyway where there is no GPU; it shows where there is one.": (
        "flow/coupling.py: independent: torch.randn(noise.shape, generator=generator, device=generator.device, "
        "dtype=torch.float32) -> torch.randn(noise.shape, generator=generator, dtype=torch.float32)",
        "flow/coupling.py: minibatch_optimal_transport: torch.as_tensor(partner, device=noise.device) -> "
        "torch.as_tensor(partner)",
        "flow/ode.py: _evaluate: torch.full(x.shape[:1], t, device=x.device, dtype=torch.promote_types(x.dtype, "
        "torch.float32)) -> torch.full(x.shape[:1], t, dtype=torch.promote_types(x.dtype, torch.float32))",
        "flow/time_density.py: LogitNormal.sample: torch.randn(count, generator=generator, device=generator.device, "
        "dtype=torch.float32) -> torch.randn(count, generator=generator, dtype=torch.float32)",
        "flow/time_density.py: FixedTime.sample: torch.full((count,), self.t, dtype=torch.float32, "
        "device=generator.device) -> torch.full((count,), self.t, dtype=torch.float32)",
        "flow/time_density.py: Grid.sample: torch.randint(self.steps, (count,), generator=generator, "
        "device=generator.device) -> torch.randint(self.steps, (count,), generator=generator)",
        "flow/time_density.py: _uniform: torch.rand(count, generator=generator, device=generator.device, "
        "dtype=torch.float64) -> torch.rand(count, generator=generator, dtype=torch.float64)",
        "schedulers.py: RectifiedFlowEulerScheduler.set_timesteps: torch.as_tensor(given, dtype=torch.float64, "
        "device='cpu') -> torch.as_tensor(given, dtype=torch.float64)",
        "schedulers.py: RectifiedFlowEulerScheduler._set_grid: torch.device(device).type == 'cuda' -> "
        "torch.device(device).type != 'cuda'",
        "schedulers.py: RectifiedFlowEulerScheduler._set_grid: 'cuda' -> 'cudaX'",
        "schedulers.py: RectifiedFlowEulerScheduler._set_grid: timesteps.to(torch.float32).to(device, "
        "non_blocking=on_cuda) -> timesteps.to(torch.float32).to(device)",
    ),
    "The start of Newton's method, which ends at the same root from anywhere in the cell and has steps to spare.": (
        "flow/interpolation.py: VariancePreserving.timestep_at: (angle - angles[index]) / (angles[index + 1] - "
        "angles[index]) -> (angle - angles[index]) * (angles[index + 1] - angles[index])",
        "flow/interpolation.py: VariancePreserving.timestep_at: angles[index + 1] - angles[index] -> "
        "angles[index + 1] + angles[index]",
        "flow/interpolation.py: VariancePreserving.timestep_at: 10 -> 11",
        "flow/interpolation.py: VariancePreserving.timestep_at: 1 -> 2 (5)",
    ),
    "A knot belongs to the cells on both of its sides, and the cubic is continuous there.": (
        "flow/interpolation.py: VariancePreserving.timestep_at: torch.searchsorted(angles, angle, right=True) -> "
        "torch.searchsorted(angles, angle)",
        "flow/interpolation.py: VariancePreserving.timestep_at: True -> False",
    ),
    "`torch.func.jvp` gives two values, so that the first three are those two.": (
        "flow/interpolation.py: _value_and_derivative: 2 -> 3",
    ),
    "A coefficient that no prediction of a diffusion network asks for, as the line says.": (
        "flow/prediction.py: DiffusionAsFlow.velocity: -sigma -> sigma",
    ),
    "Both halves of the path say the same at t = 1/2.": (
        "flow/prediction.py: DiffusionAsFlow.velocity: t >= 0.5 -> t > 0.5",
    ),
    "The bound of what counts as zero: anything between a rounding error and a real divisor would do.": (
        "flow/prediction.py: _check_divisor: divisor.abs() <= 4 * torch.finfo(divisor.dtype).eps -> divisor.abs() < "
        "4 * torch.finfo(divisor.dtype).eps",
        "flow/prediction.py: _check_divisor: 4 -> 5",
        "schedulers.py: RectifiedFlowEulerScheduler.index_for_timestep: distance[index] <= 1e-06 * "
        "self.config['num_train_timesteps'] -> distance[index] < 1e-06 * self.config['num_train_timesteps']",
    ),
    "A value for the places that the next line throws away.": (
        "flow/time_density.py: LogitNormal.density: 0.5 -> 1.5",
        "flow/time_density.py: LogitNormal.density: 0.5 -> 0.0",
        "flow/time_density.py: UShaped.density: 1 -> 2",
    ),
    "A bound that only rounding could pass, and by less than it allows.": (
        "flow/time_density.py: UShaped.sample: 1 -> 2 (2)",
    ),
    "The quicker way to an index that the slower one finds too; which was taken shows on a GPU, as time.": (
        "schedulers.py: RectifiedFlowEulerScheduler.index_for_timestep: timestep.ndim == 0 -> timestep.ndim != 0",
        "schedulers.py: RectifiedFlowEulerScheduler.index_for_timestep: 0 -> 1",
        "schedulers.py: _share_memory: return one.dtype == other.dtype and one.untyped_storage()._cdata == "
        "other.untyped_storage()._cdata -> return None",
        "schedulers.py: _share_memory: one.dtype == other.dtype -> one.dtype != other.dtype",
        "schedulers.py: _share_memory: one.untyped_storage()._cdata == other.untyped_storage()._cdata -> "
        "one.untyped_storage()._cdata != other.untyped_storage()._cdata",
    ),
    "`timesteps` is a tensor of its own, so that its offset in memory is 0.": (
        "schedulers.py: RectifiedFlowEulerScheduler.index_for_timestep: timestep.storage_offset() - "
        "self.timesteps.storage_offset() -> timestep.storage_offset() + self.timesteps.storage_offset()",
    ),
    "A shift of 1 warps by nothing, bit for bit.": (
        "schedulers.py: RectifiedFlowEulerScheduler.set_timesteps: 1 -> 0 (3)",
    ),
}
EXPLAINED = {name: reason for reason, names in _REASONS.items() for name in names}
