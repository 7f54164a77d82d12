"""Images and masks in every form that users have: the same picture gives the same result, or is refused by name."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rectified_diffusers import (
    RectifiedFlowControlNetImg2ImgPipeline,
    RectifiedFlowControlNetPipeline,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowInpaintPipeline,
    edit,
    invert,
    optimize,
    read_pictures,
)
from rectified_diffusers.images import as_images, as_masks, open_image, to_mask, to_rgb
from tests.marks import slow_but
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline

SIZE = 32
LEVELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
COLOR = Image.fromarray(LEVELS)
GRAY = Image.fromarray(LEVELS[..., 0])
ALPHA = np.zeros((SIZE, SIZE), dtype=np.uint8)
ALPHA[8:24, 4:20] = 255
MASK = Image.fromarray(ALPHA)
ON_WHITE = np.where(ALPHA[..., None] > 0, LEVELS, 255).astype(np.uint8)
UNIT = torch.from_numpy(LEVELS).permute(2, 0, 1) / 255


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def translucent(mode: str) -> Image.Image:
    """Return the picture behind a mask, with its colors kept where it is transparent."""
    return Image.fromarray(np.dstack([LEVELS, ALPHA])).convert(mode)


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray((ALPHA > 0).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.info["transparency"] = 0
    return image


def sixteen_bit() -> Image.Image:
    return Image.fromarray(LEVELS[..., 0].astype(np.uint16) * 257)


GRAYS = {
    "L": GRAY,
    "I;16": sixteen_bit(),
    "I, 8 bit": Image.fromarray(LEVELS[..., 0].astype(np.int32)),
    "I, 16 bit": Image.fromarray(LEVELS[..., 0].astype(np.int32) * 257),
    "F, unit": Image.fromarray(LEVELS[..., 0].astype(np.float32) / 255),
    "F, 8 bit": Image.fromarray(LEVELS[..., 0].astype(np.float32)),
    "P": GRAY.convert("P"),
    "LA": Image.merge("LA", (GRAY, Image.new("L", GRAY.size, 255))),
    "uint8 array (H, W)": LEVELS[..., 0],
    "uint8 array (H, W, 1)": LEVELS[..., :1],
    "uint16 array": LEVELS[..., 0].astype(np.uint16) * 257,
    "float array (H, W)": LEVELS[..., 0].astype(np.float32) / 255,
    "float tensor (1, H, W)": torch.from_numpy(LEVELS[..., 0])[None] / 255,
}
COLORS = {
    "RGB": COLOR,
    "RGBA, opaque": COLOR.convert("RGBA"),
    "RGBX": COLOR.convert("RGBX"),
    "uint8 array": LEVELS,
    "uint8 array (B, H, W, C)": LEVELS[None],
    "int64 array": LEVELS.astype(np.int64),
    "uint16 array": LEVELS.astype(np.uint16) * 257,
    "float array of 0 to 255": LEVELS.astype(np.float64),
    "float array": LEVELS.astype(np.float32) / 255,
    "uint8 tensor": torch.from_numpy(LEVELS).permute(2, 0, 1),
    "uint8 tensor (B, C, H, W)": torch.from_numpy(LEVELS).permute(2, 0, 1)[None],
    "float tensor": UNIT,
    "float tensor of 0 to 255": UNIT * 255,
    "list": [COLOR],
}
TRANSPARENT = {
    "RGBA": translucent("RGBA"),
    "RGBa": translucent("RGBa"),
    "uint8 array (H, W, 4)": np.dstack([LEVELS, ALPHA]),
    "float array (H, W, 4)": np.dstack([LEVELS, ALPHA]).astype(np.float32) / 255,
    "uint8 tensor (4, H, W)": torch.from_numpy(np.dstack([LEVELS, ALPHA])).permute(2, 0, 1),
}


def levels(value) -> np.ndarray:
    """Return what `as_images` or `as_masks` gave as 8-bit levels `(H, W, C)` of its first image."""
    while isinstance(value, list):
        value = value[0]
    if isinstance(value, Image.Image):
        return np.atleast_3d(np.asarray(value))
    value = value[0] if value.ndim == 4 else value
    return (value.float() * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("image", GRAYS.values(), ids=GRAYS)
def test_gray_images_become_rgb(image):
    assert (levels(as_images("image", image)) == LEVELS[..., :1]).all()


@pytest.mark.parametrize("image", COLORS.values(), ids=COLORS)
def test_color_images_keep_their_levels(image):
    assert (levels(as_images("image", image)) == LEVELS).all()


@pytest.mark.parametrize("image", TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparency_becomes_white_and_hidden_colors_never_show(image):
    assert (levels(as_images("image", image)) == ON_WHITE).all()


def test_transparent_palettes_and_gray_alpha_become_white_too():
    expected = np.where(ALPHA > 0, 200, 255)
    assert (pixels(to_rgb(palette_with_transparency()))[..., 0] == expected).all()
    gray = Image.merge("LA", (GRAY, MASK))
    assert (pixels(to_rgb(gray)) == np.where(ALPHA[..., None] > 0, LEVELS[..., :1], 255)).all()


def test_bools_are_black_and_white():
    assert (levels(as_images("image", ALPHA > 0)) == ALPHA[..., None]).all()


def read_only(array):
    array.flags.writeable = False
    return array


ODD_ARRAYS = {
    "read-only": read_only(LEVELS.copy()),
    "read-only, float": read_only(LEVELS / 255),
    "not contiguous": np.asfortranarray(LEVELS)[::-1][::-1],
    "big-endian, 16 bit": (LEVELS.astype(np.uint16) * 257).astype(">u2"),
    "big-endian, float": (LEVELS / 255).astype(">f4"),
    "float16": (LEVELS / 255).astype(np.float16),
    "longdouble": (LEVELS / 255).astype(np.longdouble),
    "masked array": np.ma.masked_array(LEVELS, mask=LEVELS > 200),
    "with a gradient": UNIT.clone().requires_grad_(),
    "float64 tensor": UNIT.double(),
    "int32 tensor": UNIT.mul(255).round().int(),
    "uint16 tensor": torch.from_numpy(LEVELS.astype(np.uint16) * 257).permute(2, 0, 1),
    "RGB and alpha as floats, as torchvision reads a file": torch.cat([UNIT, torch.ones(1, SIZE, SIZE)]),
}


@pytest.mark.parametrize("image", ODD_ARRAYS.values(), ids=ODD_ARRAYS)
def test_arrays_of_every_kind(stock_levels, image):
    assert (levels(as_images("image", image, latent_channels=4)) == LEVELS).all()
    ours, expected = (image_to_image(stock_levels, each, strength=0.3) for each in (image, COLOR))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


def saved(image, extension, **options):
    data = io.BytesIO()
    image.save(data, extension, **options)
    data.seek(0)
    return Image.open(data)


FRAMES = [Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 0)), COLOR.convert("RGBA")]
FIRST = tuple(map(int, LEVELS[0, 0]))
FILES = {  # with the color of the first pixel
    "a color that is transparent": (saved(COLOR, "PNG", transparency=FIRST), (255, 255, 255)),
    "a gray that is transparent": (saved(GRAY, "PNG", transparency=FIRST[0]), (255, 255, 255)),
    "a gray of 16 bit that is transparent": (
        saved(sixteen_bit(), "PNG", transparency=257 * FIRST[0]),
        (255, 255, 255),
    ),
    "a palette that is transparent": (saved(COLOR.convert("P"), "PNG", transparency=bytes(256)), (255, 255, 255)),
    "black of 1 bit that is transparent": (saved(Image.new("1", (8, 8)), "PNG", transparency=0), (255, 255, 255)),
    "an animated GIF": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (255, 255, 255)),
    "an animated WebP": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), (255, 255, 255)),
    "an animated PNG": (saved(FRAMES[1], "PNG", save_all=True, append_images=FRAMES[:1]), FIRST),
    "a TIFF of floats": (saved(GRAYS["F, unit"], "TIFF"), FIRST[:1] * 3),
    "a TIFF of 16 bit": (saved(sixteen_bit(), "TIFF"), FIRST[:1] * 3),
    "a BMP of 1 bit": (saved(Image.new("1", (8, 8), 1), "BMP"), (255, 255, 255)),
    "a TGA with alpha": (saved(FRAMES[0], "TGA"), (255, 255, 255)),
    "a JPEG in CMYK": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "an orientation that does not exist": (saved(COLOR, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1"), FIRST),
}


@pytest.mark.parametrize(("image", "color"), FILES.values(), ids=FILES)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_files_of_every_kind(image, color):
    assert to_rgb(image).getpixel((0, 0)) == color


def test_damaged_exif_data_is_left_out():
    image = COLOR.copy()
    image.info["exif"] = b"garbage"
    assert (pixels(to_rgb(image)) == LEVELS).all()


def test_half_transparency_is_composited():
    half = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    assert pixels(to_rgb(half))[0, 0].tolist() == [127, 177, 227]


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_converted_by_pil(mode):
    image = COLOR.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4), (128, 128, 128))
    assert to_rgb(image).mode == "RGB"
    assert to_mask(image).mode == "L"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 0, 0), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    read = open_image(tmp_path / "a.png")
    assert read.size == ((16, 8) if orientation < 5 else (8, 16))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    x, y = corners[orientation]
    assert read.getpixel((x * (read.width - 1), y * (read.height - 1))) == (255, 0, 0)


MASKS = {
    "L": MASK,
    "1": MASK.convert("1"),
    "RGB": MASK.convert("RGB"),
    "I;16": Image.fromarray(ALPHA.astype(np.uint16) * 257),
    "alpha over black": Image.merge("RGBA", (*Image.new("RGB", MASK.size).split(), MASK)),
    "alpha over white": Image.merge("RGBA", (*Image.new("RGB", MASK.size, "white").split(), MASK)),
    "LA": Image.merge("LA", (Image.new("L", MASK.size), MASK)),
    "opaque RGBA": MASK.convert("RGBA"),
    "bool array": ALPHA > 0,
    "bool tensor": torch.from_numpy(ALPHA > 0),
    "bool array (B, H, W)": (ALPHA > 0)[None],
    "uint8 array of 0 and 1": ALPHA // 255,
    "uint8 array": ALPHA,
    "uint8 array (H, W, 3)": np.dstack([ALPHA] * 3),
    "uint8 array (H, W, 4)": np.dstack([LEVELS, ALPHA]),
    "float array": ALPHA.astype(np.float64) / 255,
    "float array of 0 to 255": ALPHA.astype(np.float32),
    "float tensor (1, H, W)": torch.from_numpy(ALPHA)[None] / 255,
    "float tensor (1, 1, H, W)": torch.from_numpy(ALPHA)[None, None] / 255,
    "int64 tensor": torch.from_numpy(ALPHA).long() // 255,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_in_every_form(mask):
    assert (levels(as_masks("mask_image", mask))[..., 0] == ALPHA).all()


@pytest.fixture(scope="module")
def stock_levels():
    """The result of a pipeline for the picture as PIL in mode RGB, which diffusers reads correctly."""
    pipeline = make_tiny_pipeline("flow")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_to_image(pipeline, image, cls=RectifiedFlowImg2ImgPipeline, **kwargs):
    start = torch.manual_seed(0)
    return cls.from_pipe(pipeline)("a", image=image, generator=start, output_type="pt", **kwargs).images


SAME = {**COLORS, **{f"transparent {name}": image for name, image in TRANSPARENT.items()}}


@pytest.mark.parametrize("name", SAME)
def test_image_to_image_reads_every_form(stock_levels, name):
    expected = Image.fromarray(ON_WHITE) if name.startswith("transparent") else COLOR
    ours, stock = (image_to_image(stock_levels, image, strength=0.3) for image in (SAME[name], expected))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    assert ours.shape[-1] == SIZE


@pytest.mark.parametrize(
    "name", slow_but(["L", "I;16", "alpha over white", "bool array", "float array", "int64 tensor"], MASKS)
)
def test_inpainting_reads_every_mask(stock_levels, name):
    call = {"cls": RectifiedFlowInpaintPipeline, "height": SIZE, "width": SIZE}
    ours, stock = (image_to_image(stock_levels, COLOR, mask_image=mask, **call) for mask in (MASKS[name], MASK))
    assert torch.equal(ours, stock)
    assert not torch.equal(ours, image_to_image(stock_levels, COLOR, mask_image=Image.new("L", MASK.size), **call))


@pytest.mark.parametrize("name", ["RGBA", "uint8 array (H, W, 4)", "float array (H, W, 4)", "uint8 tensor (4, H, W)"])
def test_a_controlnet_reads_every_form(stock_levels, name):
    net = make_tiny_controlnet(stock_levels.unet)
    expected = Image.fromarray(ON_WHITE)
    for cls, extra in (
        (RectifiedFlowControlNetPipeline, {}),
        (RectifiedFlowControlNetImg2ImgPipeline, {"image": COLOR, "strength": 0.5}),
    ):
        pipeline = cls.from_pipe(stock_levels, controlnet=net)
        key = "control_image" if extra else "image"
        ours, stock = (
            pipeline("a", generator=torch.manual_seed(0), output_type="pt", **{**extra, key: image}).images
            for image in (TRANSPARENT[name], expected)
        )
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_latents_stay_latents(stock_levels):
    latents = torch.randn(1, 4, 8, 8)
    assert as_images("image", latents, latent_channels=4) is latents
    assert image_to_image(stock_levels, latents, strength=0.5).shape[-1] == SIZE


@pytest.mark.parametrize("name", TRANSPARENT)
def test_inversion_reads_every_form(stock_levels, name):
    ours, expected = (invert(stock_levels, image, "a", 1) for image in (TRANSPARENT[name], Image.fromarray(ON_WHITE)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_edit_keeps_transparency_white(stock_levels):
    edited = edit(stock_levels, translucent("RGBA"), "a", "b", 1)
    assert pixels(edited[0]).tolist() == pixels(edit(stock_levels, Image.fromarray(ON_WHITE), "a", "b", 1)[0]).tolist()


def test_real_images_are_read_alike(tmp_path):
    translucent("RGBA").save(tmp_path / "a.png")
    Image.fromarray(ON_WHITE).save(tmp_path / "b.png")
    sixteen_bit().save(tmp_path / "c.png")
    lines = [f'{{"file_name": "{name}.png", "text": "a"}}' for name in "abc"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    images = read_pictures(tmp_path, SIZE).read([0, 1, 2])
    assert torch.equal(images[0], images[1])
    assert (images[2].permute(1, 2, 0).numpy() == LEVELS[..., :1]).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 5), (1, 2, 8, 8, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="image: expected the shape of an image"):
        as_images("image", np.zeros(shape))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "expected an image, got NoneType"),
        ("cat.png", "expected an image, got str"),
        (torch.zeros(1, 8, 8, 3), r"expected the shape of an image, got \(1, 8, 8, 3\)"),
        (torch.zeros(1, 5, 8, 8), r"expected the shape of an image, got \(1, 5, 8, 8\)"),
        (torch.zeros(8), r"expected the shape of an image, got \(8,\)"),
        (np.zeros((0, 8, 3)), r"expected the shape of an image, got \(0, 8, 3\)"),
        (np.full((8, 8, 3), np.nan), "got nan to nan"),
        (np.full((8, 8, 3), 1.5), r"expected floating-point levels in \[0, 1\]"),
        (np.full((8, 8, 3), -7.0), "got -7 to -7"),
        (np.full((8, 8, 3), 300.0), "got 300 to 300"),
        (np.full((8, 8, 3), -1), "expected integer levels"),
        (np.full((8, 8, 3), 70000), "expected integer levels"),
    ],
)
@pytest.mark.parametrize("convert", [as_images, as_masks])
def test_what_is_no_image_is_refused_by_name(convert, value, text):
    with pytest.raises((TypeError, ValueError), match=text) as caught:
        convert("picture", value)
    assert str(caught.value).startswith("picture: ")


def of_mode_f(value):
    return Image.fromarray(np.full((8, 8), value, dtype=np.float32))


DAMAGED = {
    "no pixels": (Image.new("RGB", (0, 5)), "got one of 0 x 5 pixels"),
    "NaN": (of_mode_f(np.nan), "expected levels from 0 to 255 or 65535, got nan to nan"),
    "negative": (of_mode_f(-1), "got -1 to -1 in mode F"),
    "too large": (Image.fromarray(np.full((8, 8), 10**9, dtype=np.int32)), r"got 1e\+09 to 1e\+09 in mode I"),
    "complex": (LEVELS.astype(complex), "expected an array of real numbers, got complex128"),
    "objects": (LEVELS.astype(object), "expected an array of real numbers, got object"),
    "text": (np.array([["a"]]), "expected an array of real numbers, got <U1"),
    "a sparse tensor": (UNIT.to_sparse(), "expected a dense tensor"),
    "a tensor without values": (torch.zeros(3, 8, 8, device="meta"), "got torch.float32 on meta"),
    "bytes": (b"GIF89a", "expected an image, got bytes"),
    "an open file": (io.BytesIO(), "expected an image, got BytesIO"),
}


@pytest.mark.parametrize(("value", "text"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("convert", [as_images, as_masks])
def test_damaged_images_are_refused_by_name(convert, value, text):
    with pytest.raises((TypeError, ValueError), match=f"picture: .*{text}"):
        convert("picture", value)


def test_a_file_that_ends_early_is_refused_by_name(stock_levels):
    data = io.BytesIO()
    COLOR.save(data, "PNG")
    with pytest.raises(ValueError, match=r"image: the image cannot be read .*truncated"):
        image_to_image(stock_levels, Image.open(io.BytesIO(data.getvalue()[:-500])))


@pytest.mark.parametrize("mixed", [[COLOR, LEVELS], [COLOR, UNIT], [LEVELS / 255, LEVELS], [2 * UNIT - 1, COLOR]])
def test_lists_of_different_kinds(stock_levels, mixed):
    pipeline = RectifiedFlowImg2ImgPipeline.from_pipe(stock_levels)
    call = {"strength": 0.3, "output_type": "pt"}
    ours, expected = (
        pipeline(["a", "a"], image=images, generator=torch.manual_seed(0), **call).images
        for images in (mixed, [COLOR, COLOR])
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    nested = pipeline(["a", "a"], image=[[image] for image in mixed], generator=torch.manual_seed(0), **call).images
    assert torch.equal(nested, ours)
    inverted = invert(stock_levels, mixed, ["a", "a"], 1)
    torch.testing.assert_close(inverted, invert(stock_levels, [COLOR, COLOR], ["a", "a"], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([], "expected an image, got an empty list"),
        (None, "expected an image, got NoneType"),
        ([COLOR, COLOR], "expected one image for each of 1 to generate, or one for all, got 2"),
        ([UNIT, UNIT[:, :16]], r"expected images of one size, got \(3, 16, 32\) and \(3, 32, 32\)"),
        (Image.new("RGB", (3, 100)), "expected at least 4 x 4 pixels, got 3 x 100"),
        (torch.zeros(3, 100, 1), "expected at least 4 x 4 pixels, got 1 x 100"),
    ],
)
def test_images_that_fit_no_call_are_refused_by_name(stock_levels, images, text):
    with pytest.raises((TypeError, ValueError), match=f"image: {text}"):
        image_to_image(stock_levels, images)


@pytest.mark.parametrize("name", ["uint8 array", "float array", "float tensor", "list"])
def test_every_form_can_be_cropped_around_its_mask(stock_levels, name):
    def crop(image, mask):
        pipeline = RectifiedFlowInpaintPipeline.from_pipe(stock_levels)
        call = {"padding_mask_crop": 4, "generator": torch.manual_seed(0)}
        return pipeline("a", image=image, mask_image=mask, **call).images[0]

    mask = {"float array": ALPHA / 255, "float tensor": torch.from_numpy(ALPHA)[None] / 255, "list": [MASK]}
    ours, expected = crop(COLORS[name], mask.get(name, ALPHA)), crop(COLOR, MASK)
    assert pixels(ours).tolist() == pixels(expected).tolist()


def test_an_empty_mask_cannot_be_cropped_around(stock_levels):
    with pytest.raises(ValueError, match="mask_image: expected masked pixels, got none"):
        image_to_image(
            stock_levels,
            COLOR,
            RectifiedFlowInpaintPipeline,
            mask_image=Image.new("L", (SIZE, SIZE)),
            padding_mask_crop=4,
        )


def png_of(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("1", size).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (png_of((20000, 20000)), "expected at most 89478485 pixels"),
        (b"not an image", "is not a readable image"),
        (b"", "is not a readable image"),
        (png_of((64, 64))[:50], "is not a readable image"),
        (b"GIF89a" + bytes(3), "is not a readable image"),
    ],
    ids=["huge", "text", "empty", "truncated", "a broken GIF"],
)
def test_files_that_cannot_be_read_are_refused_with_their_name(tmp_path, content, text):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        open_image(tmp_path / "a.png")
    assert "a.png" in str(caught.value)


@given(
    shape=st.sampled_from([(4, 4), (4, 4, 1), (4, 4, 2), (4, 4, 3), (4, 4, 4), (2, 4, 4, 3)]),
    dtype=st.sampled_from(["uint8", "uint16", "float32", "float64", "bool"]),
    seed=st.integers(0, 1000),
)
def test_any_array_becomes_an_image_in_range(shape, dtype, seed):
    random = np.random.default_rng(seed)
    scale = {"uint8": 255, "uint16": 65535, "bool": 1}.get(dtype, 1.0)
    value = (random.random(shape) * scale).astype(dtype)
    for image in (as_images("image", value), as_masks("mask", value)):
        assert levels(image).ndim == 3
        if isinstance(image, torch.Tensor):
            assert image.min() >= 0
            assert image.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_latents_of_another_dtype_are_converted(stock_levels, dtype):
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0)).to(dtype)
    ours, expected = (stock_levels("a", latents=each, output_type="pt").images for each in (latents, latents.float()))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_nan_weights_draw_no_black_image(part, fast, output_type):
    pipeline = make_tiny_pipeline("flow")
    list(getattr(pipeline, part).parameters())[-1].data.fill_(float("nan"))
    if fast:
        optimize(pipeline, dtype=None)
    with pytest.raises(FloatingPointError, match="got NaN or infinity"):
        pipeline("a", output_type=output_type)


def test_a_default_dtype_of_float64_changes_nothing(stock_levels):
    expected = stock_levels("a", generator=torch.manual_seed(0), output_type="pt").images
    torch.set_default_dtype(torch.float64)
    try:
        images = stock_levels("a", generator=torch.manual_seed(0), output_type="pt").images
        invert(stock_levels, COLOR, "a", 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(images, expected)
