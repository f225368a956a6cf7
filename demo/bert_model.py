"""Write the demo model in the layout of diffusers' `LDMTextToImagePipeline`: latent diffusion with a BERT text encoder.

    python -m demo.bert_model --output output/demo-bert

The folder holds the U-Net, scheduler and autoencoder of `demo/model` and the text encoder and tokenizer of `demo/bert`,
whose states mean to that U-Net what those of its CLIP text encoder mean (`demo.bert_training`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import diffusers
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTextModel, CLIPTokenizer

from demo.bert_tokenizer import load_wordpiece
from textual_inversion.wordpiece import PROMPT_LENGTH

HERE = Path(__file__).resolve().parent
_UNET_KEY = "unet_sha256"
"""Key in the text encoder's configuration for the digest of the U-Net that it was trained for."""
_UNUSED_LAYER = "to_logits"
"""Layer of `LDMBertModel` that no state depends on. Its weights are written as zeros and not kept in `demo/bert`."""
_SCALE = ".scale"
"""End of the name of a matrix's scales."""
_COMPONENTS = {
    "bert": ["latent_diffusion", "LDMBertModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "BertTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vqvae": ["diffusers", "AutoencoderKL"],
}


@torch.no_grad()
def bert_from_clip(teacher: CLIPTextModel, theirs: CLIPTokenizer, ours: BertTokenizer) -> LDMBertModel:
    """Make a BERT text encoder that computes what the CLIP text encoder does, save for the causal mask, in fp32.

    `LDMBertModel` has no mask and no biases before attention. A key's bias changes no attention weight, a value's adds
    a constant after attention, and a query's is folded into the norm before it. A token starts at the mean row of the
    teacher's tokens for the same text; positions beyond the teacher's last start at its vector.
    """
    config = teacher.config
    student = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(ours),
            max_position_embeddings=PROMPT_LENGTH,
            encoder_layers=config.num_hidden_layers,
            encoder_ffn_dim=config.intermediate_size,
            encoder_attention_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            activation_function=config.hidden_act,
            d_model=config.hidden_size,
            dropout=0.0,
            pad_token_id=ours.pad_token_id,
        )
    ).float()
    nn.init.zeros_(student.to_logits.weight)
    nn.init.zeros_(student.to_logits.bias)
    model, text = student.model, getattr(teacher, "text_model", teacher)
    model.embed_tokens.weight.copy_(_rows(teacher.get_input_embeddings().weight, theirs, ours))
    positions = text.embeddings.position_embedding.weight
    beyond = positions[-1:].expand(PROMPT_LENGTH - len(positions), -1)
    model.embed_positions.weight.copy_(torch.cat([positions, beyond]))
    model.layer_norm.load_state_dict(text.final_layer_norm.state_dict())
    for layer, source in zip(model.layers, text.encoder.layers, strict=True):
        _copy_layer(layer, source)
    return student


def _rows(rows: Tensor, theirs: CLIPTokenizer, ours: BertTokenizer) -> Tensor:
    """Return the student's token table, [tokens, width]."""
    special = {ours.cls_token: theirs.bos_token_id, ours.sep_token: theirs.eos_token_id}
    special[ours.pad_token] = theirs.pad_token_id
    table = rows.mean(0).repeat(len(ours), 1)
    for token, index in ours.get_vocab().items():
        if token in special:
            table[index] = rows[special[token]]
        elif token not in ours.all_special_tokens:
            pieces = theirs(token.removeprefix("##"), add_special_tokens=False).input_ids
            table[index] = rows[pieces].mean(0)
    return table


def _copy_layer(layer: nn.Module, source: nn.Module) -> None:
    """Copy one layer of CLIP's encoder into one of LDMBert's (untyped), its biases folded into others."""
    ours, theirs = layer.self_attn, source.self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(ours, name).weight.copy_(getattr(theirs, name).weight)
    norm, query, value = source.layer_norm1, theirs.q_proj, theirs.v_proj
    shift = torch.linalg.lstsq(query.weight.double(), query.bias.double()[:, None]).solution[:, 0].float()
    layer.self_attn_layer_norm.weight.copy_(norm.weight)
    layer.self_attn_layer_norm.bias.copy_(norm.bias + shift)
    ours.out_proj.weight.copy_(theirs.out_proj.weight)
    ours.out_proj.bias.copy_(theirs.out_proj.bias + theirs.out_proj.weight @ (value.bias - value.weight @ shift))
    layer.final_layer_norm.load_state_dict(source.layer_norm2.state_dict())
    layer.fc1.load_state_dict(source.mlp.fc1.state_dict())
    layer.fc2.load_state_dict(source.mlp.fc2.state_dict())


def unet_digest(model: Path) -> str:
    """Return the SHA-256 of a pipeline folder's U-Net weights, in hex digits."""
    (weights,) = (model / "unet").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def save_bert(student: LDMBertModel, folder: Path, unet_sha256: str) -> None:
    """Write the text encoder's configuration and weights into `folder`, with the digest of its U-Net.

    Matrices are rounded to whole numbers from -127 to 127, with a scale for each row, and vectors to fp16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = {}
    for key, value in student.state_dict().items():
        if key.startswith(_UNUSED_LAYER):
            continue
        if value.ndim == 2:
            scale = value.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
            kept[key + _SCALE] = scale
            kept[key] = (value / scale).round().to(torch.int8)
        else:
            kept[key] = value.half()
    save_file({key: value.contiguous() for key, value in kept.items()}, folder / "model.safetensors")
    config = student.config.to_diff_dict() | {"dtype": "float32", _UNET_KEY: unet_sha256}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_bert(folder: Path) -> LDMBertModel:
    """Read what `save_bert` wrote, in fp32. Raises RuntimeError if weights are missing or unknown."""
    student = LDMBertModel(LDMBertConfig.from_json_file(folder / "config.json")).float()
    weights = {key: torch.zeros_like(value) for key, value in student.state_dict().items() if _UNUSED_LAYER in key}
    stored = load_file(folder / "model.safetensors")
    for key, value in stored.items():
        if not key.endswith(_SCALE):
            weights[key] = value * stored[key + _SCALE] if value.dtype == torch.int8 else value
    student.load_state_dict(weights)
    return student


def assemble(model: Path, bert: Path, output: Path) -> None:
    """Write the pipeline folder `output` from a Stable Diffusion folder and a text encoder that was trained for it.

    Raises ValueError if the text encoder was trained for another U-Net.
    """
    config = json.loads((bert / "bert" / "config.json").read_text())
    if config[_UNET_KEY] != unet_digest(model):
        raise ValueError(
            f"the text encoder in {bert} was trained for another U-Net than that in {model}: train it again "
            "(python -m demo.train --stages bert)"
        )
    output.mkdir(parents=True, exist_ok=True)
    for source, name in (("unet", "unet"), ("scheduler", "scheduler"), ("vae", "vqvae")):
        shutil.copytree(model / source, output / name, dirs_exist_ok=True)
    load_wordpiece(bert / "tokenizer").save_pretrained(output / "tokenizer")
    load_bert(bert / "bert").half().save_pretrained(output / "bert")
    shutil.copy(bert / "bert" / "config.json", output / "bert")  # fp16 files that load as fp32
    index = {"_class_name": "LDMTextToImagePipeline", "_diffusers_version": diffusers.__version__} | _COMPONENTS
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE / "model", help="Stable Diffusion folder")
    parser.add_argument("--bert", type=Path, default=HERE / "bert", help="folder of the BERT text encoder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    assemble(options.model, options.bert, options.output)
    sys.stdout.write(f"wrote {options.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
