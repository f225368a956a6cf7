"""Drawing with learned concepts in diffusers' StableDiffusionPipeline, also with adapters that diffusers cannot load.

A causal adapter (TextBoost v2, ++) acts from its concept's first token on, for which diffusers has no loader. Here the
pipeline's own text encoder and U-Net are hooked into. What the text encoder works out for the cross-attention layers
(TextBoost++) travels as further columns of its states, which a pipeline copies, concatenates and moves like any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from textual_inversion.concept import LearnedAdapter, LearnedEmbedding
from textual_inversion.conditioning import LayerChanges
from textual_inversion.cross_attention import CrossAttentionLayers
from textual_inversion.lora import AdaptableLayers, AdapterBatch, acting_positions
from textual_inversion.tokenizer import TEXT_ENCODER_KEY


def load_into_pipeline(pipeline: Any, embeddings: Sequence[LearnedEmbedding]) -> None:
    """Load concepts, rows and causal adapters, into a StableDiffusionPipeline, whose prompts then may name them.

        embedding = parse_diffusers((folder / "learned_embeds.safetensors").read_bytes())
        embedding = with_adapter(embedding, lambda name: (folder / name).read_bytes())
        load_into_pipeline(pipeline, [embedding])
        picture = pipeline("a photo of a <cat-toy> toy on the beach").images[0]

    Prompts that name none of the concepts, the empty one included, give what they gave before. All concepts are loaded
    in one call. Raises ValueError for a second call, for an adapter of kind 'lora', which `pipeline.load_lora_weights`
    loads, and for one of another model.
    """
    if isinstance(getattr(pipeline.text_encoder.forward, "__self__", None), _Hooks):
        raise ValueError("the pipeline has concepts with adapters already; load all of them in one call")
    for embedding in embeddings:
        if embedding.adapter and embedding.adapter.kind != "causal":
            raise ValueError(
                f"the adapter of {embedding.placeholder_token!r} is of kind {embedding.adapter.kind!r}; load its "
                "embedding by load_textual_inversion and its adapter by load_lora_weights"
            )
    adaptable = AdaptableLayers(pipeline.text_encoder, TEXT_ENCODER_KEY)
    denoiser = CrossAttentionLayers(pipeline.unet)
    _check_layers(embeddings, {**adaptable.layers, **denoiser.layers})
    concepts = []
    for embedding in embeddings:
        token = embedding.placeholder_token
        (rows,) = embedding.vectors.values()
        pipeline.load_textual_inversion({token: rows})
        words = [token, *(f"{token}_{i}" for i in range(1, len(rows)))]  # as diffusers names them
        if embedding.adapter:
            ids = pipeline.tokenizer.convert_tokens_to_ids(words)
            concepts.append(_Concept(embedding.adapter, torch.tensor(ids)))
    if concepts:
        _Hooks(pipeline, adaptable, denoiser, concepts)


@dataclass(frozen=True, slots=True)
class _Concept:
    """An adapter, and the ids of its placeholder's tokens in the pipeline's tokenizer."""

    adapter: LearnedAdapter
    ids: Tensor

    def batch(self, prompts: Tensor, end_of_text: int, dtype: torch.dtype) -> AdapterBatch:
        """Return the adapter of a batch of prompts [batch, length], which acts on those that name the concept."""
        device = prompts.device
        is_concept = torch.isin(prompts, self.ids.to(device))
        return AdapterBatch(
            tensors={
                name: (down[None].to(device, dtype), up[None].to(device, dtype))
                for name, (down, up) in self.adapter.tensors.items()
            },
            concept=torch.zeros(len(prompts), dtype=torch.long, device=device),
            scale=torch.tensor([self.adapter.scale], device=device, dtype=dtype),
            positions={TEXT_ENCODER_KEY: acting_positions("causal", prompts, is_concept, end_of_text)},
        )


class _Hooks:
    """Hooks in a pipeline's text encoder, which appends columns to its states, and its U-Net, which takes them off."""

    def __init__(
        self, pipeline: Any, adaptable: AdaptableLayers, denoiser: CrossAttentionLayers, concepts: Sequence[_Concept]
    ) -> None:
        self._adaptable = adaptable
        self._denoiser = denoiser
        self._concepts = concepts
        self._end_of_text: int = pipeline.tokenizer.eos_token_id
        self._width: int = pipeline.text_encoder.config.hidden_size
        self._directions = torch.empty(0)
        """Directions of all concepts, [1, rank, layers, dim]; the same in every call of the text encoder."""
        self._encode = pipeline.text_encoder.forward
        self._dtype = pipeline.text_encoder.dtype
        pipeline.text_encoder.forward = self._encode_with_columns
        pipeline.unet.register_forward_pre_hook(self._take_columns_off, with_kwargs=True)

    def _encode_with_columns(self, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        """Run the text encoder with the concepts' adapters; append the weights of the changes of all layers."""
        if options.get("output_hidden_states"):
            raise ValueError("clip_skip cannot be combined with learned adapters, which were trained without it")
        batches = [concept.batch(input_ids, self._end_of_text, self._dtype) for concept in self._concepts]
        with self._adaptable.using(batches):
            outputs = self._encode(input_ids, *args, **options)
        changes = self._denoiser.changes(outputs[0], batches, TEXT_ENCODER_KEY)
        if changes:
            self._directions = changes.directions[:1]
            columns = changes.weights.flatten(1, 2).mT
            outputs["last_hidden_state"] = torch.cat([outputs[0], columns], dim=-1)
        return outputs

    def _take_columns_off(
        self, _unet: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the U-Net the text encoder's own states, and the columns as changes of its layers' states."""
        states: Tensor = options["encoder_hidden_states"]
        if states.shape[-1] == self._width:
            return None
        hidden, columns = states[..., : self._width], states[..., self._width :]
        directions = self._directions.to(states).expand(len(states), -1, -1, -1)
        weights = columns.mT.reshape(*directions.shape[:3], -1)
        changes = self._denoiser.keywords(LayerChanges(weights=weights, directions=directions))
        others = options.get("cross_attention_kwargs") or {}
        given = {**others, **changes["cross_attention_kwargs"]}
        return args, {**options, "encoder_hidden_states": hidden, "cross_attention_kwargs": given}


def _check_layers(embeddings: Sequence[LearnedEmbedding], layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless the pipeline has all the layers that the adapters change."""
    for embedding in embeddings:
        for name, (down, up) in embedding.adapter.tensors.items() if embedding.adapter else ():
            if layers.get(name) != (down.shape[1], up.shape[0]):
                raise ValueError(
                    f"the adapter of {embedding.placeholder_token!r} changes a layer {name!r} with {down.shape[1]} "
                    "inputs, which the pipeline does not have; it was learned for another model"
                )
