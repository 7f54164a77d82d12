"""The model card of a trained model, and its upload to the Hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.distributed import divided
from rectified_diffusers.evaluation.straightness import Straightness, pipeline_straightness
from rectified_diffusers.files import TEMPORARY
from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.denoiser import Denoiser
from rectified_diffusers.training.identity import QUANTIZATION, STARTING_MODEL
from rectified_diffusers.training.lora import PEFT_FILES, WEIGHTS, has_loader
from rectified_diffusers.training.tracking import FOLDER

METHODS = {
    "ReflowTrainer": ("reflow", "Reflow (arXiv:2209.03003): its paths from noise to image were straightened."),
    "DistillTrainer": ("distillation", "Distillation into {steps}, as InstaFlow's (arXiv:2309.06380)."),
    "ProgressiveTrainer": ("progressive-distillation", "Progressive distillation (arXiv:2202.00512)."),
    "DistributionMatchingTrainer": (
        "distribution-matching-distillation",
        "Distribution matching distillation into {steps} (DMD2, arXiv:2405.14867).",
    ),
}


@dataclass(frozen=True)
class Card:
    """Content of a model card.

    Args:
        record: content of training.json: steps, trainer, options.
        pipeline_class: class that loads the model, or the LoRA onto its base.
        base_model: Hub id of the model that training started from; None if it has none.
        sampling_steps: number of sampling steps that the model is made for.
        arguments: further arguments of the pipeline's call, for the guidance that the model was trained with.
        component: component that a LoRA belongs to.
        by_peft: whether only peft loads the LoRA.
        last_line: the last line of the log; empty if there is none.
        straightness: S(Z), if it was measured.
    """

    record: Mapping[str, Any]
    pipeline_class: type
    base_model: str | None
    sampling_steps: int
    last_line: Mapping[str, Any]
    straightness: Straightness | None = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    component: str = "unet"
    by_peft: bool = False

    @property
    def is_lora(self) -> bool:
        return self.record.get("lora_rank") is not None

    def __str__(self) -> str:
        tag, method = METHODS.get(self.record["trainer"], ("flow", self.record["trainer"]))
        method = method.format(steps="one step" if self.sampling_steps == 1 else f"{self.sampling_steps} steps")
        if tag == "distribution-matching-distillation":
            method += f" {'With' if 'real_rows' in self.record else 'Without'} a discriminator on real images."
        relation: Any = {"base_model_relation": "adapter" if self.is_lora else "finetune"} if self.base_model else {}
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag="text-to-image",
            base_model=self.base_model,
            tags=["rectified-flow", "rectified_diffusers", tag, *(["lora"] if self.is_lora else [])],
            **relation,
        )
        if QUANTIZATION in self.record:
            base = f"the base quantized to {self.record[QUANTIZATION]}"
            method += f" The LoRA was trained on {base}. It loads onto the base with and without quantization."
        parts = [f"---\n{data.to_yaml()}\n---", f"# {self._title()}", method, self._usage(), self._training()]
        return "\n\n".join(parts) + "\n"

    def _title(self) -> str:
        what = "LoRA" if self.is_lora else "Rectified flow"
        return f"{what} trained from {self.base_model}" if self.base_model else f"{what} for text-to-image"

    def _usage(self) -> str:
        package = self.pipeline_class.__module__.split(".")[0]
        name, this = self.pipeline_class.__name__, '"REPOSITORY_OR_FOLDER"'
        lines = [f"from {package} import {name}", ""]
        if self.is_lora:
            base = f'"{self.base_model}"' if self.base_model else '"BASE_MODEL"'
            load = f"pipeline.load_lora_weights({this})"
            if self.by_peft:
                load = f"pipeline.{self.component} = PeftModel.from_pretrained(pipeline.{self.component}, {this})"
                lines.insert(1, "from peft import PeftModel")
            elif not has_loader(self.pipeline_class, self.component):
                names = f'prefix="{self.component}", weight_name="{WEIGHTS}"'
                load = f"pipeline.{self.component}.load_lora_adapter({this}, {names})"
            lines += [f"pipeline = {name}.from_pretrained({base})", load]
        else:
            lines += [f"pipeline = {name}.from_pretrained({this})"]
        arguments = {"num_inference_steps": self.sampling_steps, **self.arguments}
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        lines += [f'image = pipeline("a red apple", {given}).images[0]']
        return "\n".join(["## Use", "", "```python", *lines, "```"])

    def _training(self) -> str:
        lines = ["## Training", "", "| option | value |", "|---|---|"]
        hidden = ("lpips_weights", STARTING_MODEL)
        lines += [f"| {name} | {_plain(value)} |" for name, value in self.record.items() if name not in hidden]
        lines += ["", "## Measured", ""]
        if "loss" in self.last_line:
            loss, step = self.last_line["loss"], self.last_line["step"]
            kind = self.record.get("loss", "distribution matching")
            lines += [f"- Training loss ({kind}): {loss:.4g} in the last line of the log, step {step}"]
        if self.straightness is not None:
            total, count = self.straightness.total, self.straightness.count
            lines += [f"- Straightness S(Z), per dimension, 0 is straight: {total:.4g} over {count} paths"]
        return "\n".join([*lines, "- Nothing else yet: quality, bias and safety are those of its base, or unknown."])


def measure_straightness(pipeline: Any, dataset: TripletDataset, paths: int, denoiser: Denoiser) -> Straightness:
    """Return S(Z) of a student's pipeline over paths of the first prompts; every process must call this.

    Args:
        denoiser: of the pipeline that training started from.
    """
    prompts = dataset.rows(range(min(paths, len(dataset)))).prompts
    if not isinstance(denoiser, PipelineDenoiser):
        return pipeline_straightness(pipeline, prompts, run=divided)
    guidance = dataset.manifest.guidance_scale if denoiser.takes_guidance else None
    return pipeline_straightness(pipeline, prompts, guidance, call_options=denoiser.options, run=divided)


def base_model_of(pipeline: Any) -> str | None:
    """Return the Hub id that a pipeline was loaded from; None for a folder, whose path stays private."""
    name = str(getattr(pipeline, "name_or_path", "") or "")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


def require_repository(repo_id: str) -> None:
    """Create the repository on the Hub if it does not exist, and check write access before training."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
    except Exception as error:  # its type differs between releases of huggingface_hub
        raise OSError(
            f"The repository {repo_id!r} on the Hub can be neither made nor used ({type(error).__name__}: {error}). "
            "Log in with `hf auth login`, by a token that may write, or train without push_to_hub."
        ) from error


def upload(folder: Path, repo_id: str, lora: bool) -> None:
    """Upload a finished model with its card: the weights alone for a LoRA, else the pipeline; never checkpoints."""
    kept = [WEIGHTS, *PEFT_FILES, "README.md", "training.json"] if lora else None
    left_out = ["checkpoints/*", "validation/*", f"{FOLDER}/*", f"*{TEMPORARY}*"] + (
        [] if lora else [WEIGHTS, *PEFT_FILES]
    )
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=kept,
            ignore_patterns=left_out,
            commit_message="Upload a model trained with rectified_diffusers",
        )
    except Exception as error:  # as above
        raise OSError(
            f"The finished model is in {folder}, but its upload to {repo_id!r} failed "
            f"({type(error).__name__}: {error}). Run the same again to upload it: nothing is trained twice."
        ) from error


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
