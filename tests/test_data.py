"""Chapter two of data.py: prompts, patches and positions, with transformers as the oracle."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import CORPUS, SPECIAL, make_checkpoint, make_tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as oracle_resize,
)

from boxes import FRAMES, box_iou, convert, respoken
from data import Example, Processor, collate, without_long
from patches import mrope_positions, patchify, smart_resize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder, "{Question}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def picture(width, height, seed=0):
    rng = np.random.default_rng([seed, width, height])
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def oracle_patches(images, **limits):
    """An array of 3 or 4 rows would be read channels first, so the oracle is given pictures."""
    images = [Image.fromarray(i) if isinstance(i, np.ndarray) else i for i in images]
    out = Qwen2VLImageProcessorPil(**limits)(images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def oracle_ids(tokenizer, text, images):
    """What Qwen2VLProcessor does: repeat each pad in the text, then tokenise the whole string."""
    parts = text.split("<|image_pad|>")
    _, grid = oracle_patches(images) if images else (None, [])
    pads = ["<|image_pad|>" * (int(g.prod()) // 4) for g in grid]
    return tokenizer("".join(x + y for x, y in zip(parts, [*pads, ""])))["input_ids"]


# ---- prompt, batch ----


def test_a_batch_packs_prompts_of_unequal_length_one_after_another(processor):
    examples = [
        Example("two", "1", (picture(56, 84), picture(112, 56))),
        Example("none", "2"),
        Example("one", "3", (picture(84, 84),)),
    ]
    prompts = [processor.prompt(e) for e in examples]
    batch = collate(prompts)
    assert batch.lengths == [len(p.ids) for p in prompts]
    assert torch.equal(batch.ids, torch.cat([p.ids for p in prompts]))
    assert torch.equal(batch.positions, torch.cat([p.positions for p in prompts], 1))
    assert torch.equal(batch.patches, torch.cat([p.patches for p in prompts]))
    assert batch.grid.tolist() == [[1, 6, 4], [1, 4, 8], [1, 6, 6]]
    assert batch.next_position.tolist() == [int(p.positions.max()) + 1 for p in prompts]


def test_image_places_point_at_all_image_tokens_of_the_packed_ids(processor):
    images = (picture(56, 84),), (), (picture(56, 56),) * 2
    batch = collate([processor.prompt(Example("q", "1", some)) for some in images])
    expected = (batch.ids == processor.image_id).nonzero().flatten()
    assert torch.equal(batch.image_at, expected) and len(expected) == 6 + 4 + 4
    assert len(batch.patches) == 4 * len(batch.image_at)


def test_moving_a_batch_moves_every_tensor_and_leaves_the_original(processor):
    batch = collate([processor.prompt(Example("q", "1", (picture(56, 56),)))])
    moved = batch.to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6 and all(t.device.type == "meta" for t in tensors)
    assert moved.lengths == batch.lengths and batch.ids.device.type == "cpu"


def test_shapes_and_types_of_a_prompt_are_as_promised(processor):
    prompt = processor.prompt(Example("q", "1", (picture(56, 84),)))
    assert prompt.ids.dtype == prompt.positions.dtype == prompt.image_at.dtype == torch.int64
    assert prompt.positions.shape == (3, len(prompt.ids))
    assert prompt.patches.shape == (24, 1176) and prompt.patches.dtype == torch.float32
    text = processor.prompt(Example("q", "1"))
    assert text.patches.shape == (0, 1176) and text.patches.dtype == torch.float32
    assert text.grid.shape == (0, 3) and text.grid.dtype == torch.int64
    assert text.image_at.shape == (0,) and text.image_at.dtype == torch.int64


# ---- frames of boxes ----


def shown(prompt, nth=0) -> np.ndarray:
    """The nth picture as the model sees it: its red, (rows * 14, columns * 14), normalised."""
    counts = prompt.grid.prod(1).tolist()
    _, rows, columns = prompt.grid[nth].tolist()
    patches = prompt.patches[sum(counts[:nth]) :][: counts[nth]].numpy()
    blocks = patches.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, 0, 0]
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(rows * 14, columns * 14)


def white_box(width, height, box):
    """A black picture, white inside the box."""
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


SIZES = [  # width and height of the file; what becomes of it
    (20, 14),  # both below 28, where VLM-R1 reports the size of the picture before
    (25, 90),
    (168, 84),  # kept
    (500, 333),
    (1600, 1200),  # above max_pixels
]


@pytest.mark.parametrize("width, height", SIZES)
def test_a_box_is_where_the_model_sees_it_in_every_frame(folder, width, height):
    """From a file's pixels to the patches of the model and back, beside a picture of another size
    and after one: the size that boxes are converted by is that of the own picture."""
    gold = (width // 5, height // 4, width * 3 // 5, height * 7 // 8)
    image, other = white_box(width, height, gold), picture(300, 200)
    for frame in FRAMES:
        processor = Processor.from_pretrained(folder, "{Question} {Frame}", max_pixels=401408,
                                              frame=frame)  # fmt: skip
        processor.prompt(Example("q", "1", (other,)))
        prompt = processor.prompt(Example("Where?", str(list(gold)), (image, other)))
        view = prompt.example.view
        h, w = shown(prompt).shape
        assert (view.frame, view.gold) == (frame, "pixels")
        assert view.sizes == ((height, width, h, w), (200, 300, *shown(prompt, 1).shape))
        said = convert(gold, "pixels", frame, view.sizes[0])  # what a perfect model says
        ys, xs = np.nonzero(shown(prompt) > 0)  # normalised: about half of white
        seen = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        assert seen == pytest.approx(convert(said, frame, "resized", view.sizes[0]), abs=1.01)
        assert convert(said, frame, "pixels", view.sizes[0]) == pytest.approx(gold)
        learnt = respoken(prompt.example.solution, prompt.example)  # the same in whole numbers
        assert box_iou(f"<think>a</think><answer>{learnt}</answer>", prompt.example) > 0.95
        words = {"pixels": f"{width} x {height} and 300 x 200 pictures", "resized":
                 f"{w} x {h} and 308 x 196 pictures you see", "0-1000": "between 0 and 1000"}
        assert words[frame] in prompt.text


def test_each_family_speaks_of_boxes_as_it_was_taught(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "2.5")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "2.5" / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    assert Processor.from_pretrained(folder).frame == "0-1000"
    assert Processor.from_pretrained(tmp_path / "2.5").frame == "resized"
    assert Processor.from_pretrained(tmp_path / "2.5", frame="pixels").frame == "pixels"
    with pytest.raises(ValueError, match=r"'pixel'.*must be of pixels, resized, 0-1000"):
        Processor.from_pretrained(folder, frame="pixel")


def test_a_row_says_the_frame_of_its_gold_boxes_before_the_run_does(folder):
    processor = Processor.from_pretrained(folder, gold_frame="0-1000")
    rows = Example("q", "1"), Example("q", "1", extra={"frame": "resized"})
    assert [processor.prompt(e).example.view.gold for e in rows] == ["0-1000", "resized"]
    assert pickle.loads(pickle.dumps(processor)).gold_frame == "0-1000"


# ---- patches and positions ----


def test_resizing_rule_equals_qwens_for_any_size():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        h, w = (int(2 ** rng.uniform(2, 12)) for _ in range(2))
        if max(h, w) <= 200 * min(h, w):
            for limits in ((3136, 1003520), (3136, 401408), (784, 784), (200704, 200704)):
                assert smart_resize(h, w, 28, *limits) == oracle_resize(h, w, 28, *limits)


@pytest.mark.parametrize(
    "size", [(112, 112), (84, 140), (113, 97), (20, 30), (4, 4), (700, 5), (1500, 900), (14, 14)]
)
def test_patches_of_any_size_equal_transformers_bit_for_bit(processor, size):
    image = picture(*size)
    expected, grid = oracle_patches([image])
    prompt = processor.prompt(Example("q", "1", (image,)))
    assert torch.equal(prompt.patches, expected) and torch.equal(prompt.grid, grid)


def test_every_byte_of_every_channel_equals_transformers(processor):
    ramp = np.arange(28 * 28 * 3).reshape(28, 28, 3) * 7 % 256  # every value in each channel
    assert all(len(np.unique(ramp[..., c])) == 256 for c in range(3))
    image = np.tile(ramp.astype(np.uint8), (2, 2, 1))
    patches = torch.from_numpy(patchify(image, processor.table)[0])
    assert torch.equal(patches, oracle_patches([image])[0])


def test_a_patch_holds_channel_moment_row_column_and_four_patches_make_a_token():
    """4 x 4 pixels in patches of 1 x 1, merged 2 x 2: the order can be written down by hand."""
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0] = np.arange(16).reshape(4, 4)
    table = np.float32([[c * 1000 + b for b in range(256)] for c in range(3)])
    patches, grid = patchify(image, table, patch=1, merge=2, moments=2)
    assert grid == (1, 4, 4)
    assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert patches[1].tolist() == [1, 1, 1000, 1000, 2000, 2000]


def test_an_array_that_needs_no_resizing_is_not_changed_and_not_copied_into(processor):
    image = picture(112, 112)
    before = image.copy()
    image.setflags(write=False)  # as a picture that is mapped from a file
    prompt = processor.prompt(Example("q", "1", (image,)))
    prompt.patches.zero_()
    assert np.array_equal(image, before)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr"])
def test_pictures_of_any_mode_equal_transformers(processor, mode):
    """But for 16 bits, which are scaled where transformers clips them: test_images.py."""
    rng = np.random.default_rng(1)
    if mode in ("RGBA", "LA"):
        values = rng.integers(0, 256, (61, 83, len(mode)), dtype=np.uint8)
        image = Image.fromarray(values, mode)
    else:
        image = Image.fromarray(picture(83, 61)).convert(mode)
    assert image.mode == mode
    prompt = processor.prompt(Example("q", "1", (image,)))
    assert torch.equal(prompt.patches, oracle_patches([image])[0])


def test_a_palette_with_a_transparent_colour_is_laid_on_white(processor, tmp_path):
    image = Image.fromarray(picture(56, 56)).quantize(16)
    image.save(tmp_path / "p.png", transparency=3)
    opened = Image.open(tmp_path / "p.png")
    assert opened.mode == "P" and "transparency" in opened.info
    prompt = processor.prompt(Example("q", "1", (str(tmp_path / "p.png"),)))
    assert torch.equal(prompt.patches, oracle_patches([opened])[0])


def test_a_file_with_an_exif_rotation_is_shown_upright(processor, tmp_path):
    image = Image.fromarray(picture(56, 112))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    for source in (str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        prompt = processor.prompt(Example("q", "1", (source,)))
        assert prompt.grid.tolist() == [[1, 4, 8]]
        assert torch.equal(prompt.patches, oracle_patches([upright])[0])


def test_a_file_an_open_picture_and_an_array_give_the_same_patches(processor, tmp_path):
    image = picture(90, 70)
    Image.fromarray(image).save(tmp_path / "a.png")
    opened = Image.open(tmp_path / "a.png")
    sources = (str(tmp_path / "a.png"), tmp_path / "a.png", opened, image)
    first, *others = [processor.prompt(Example("q", "1", (s,))).patches for s in sources]
    assert all(torch.equal(first, other) for other in others)
    assert opened.getpixel((0, 0)) == tuple(image[0, 0])  # still open for its owner


def test_an_array_that_is_no_picture_is_refused_with_its_row(processor):
    for wrong in (picture(56, 56)[..., :1], picture(56, 56).astype(np.float32), picture(56, 56)[0]):
        with pytest.raises(ValueError, match=r"train\.jsonl:7: image array: expected uint8"):
            processor.prompt(Example("q", "1", (wrong,), row="train.jsonl:7"))


@pytest.mark.parametrize(
    "layout",
    [
        [5],
        [3, (1, 4, 6), 7],
        [2, (1, 6, 2), 2, (1, 3, 3), 9],
        [(1, 1, 9), 1, (1, 9, 1), 1],
        [4, (1, 2, 2)],
    ],
)
def test_positions_of_any_mix_of_text_and_images_equal_transformers(folder, processor, layout):
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).model
    runs = [[0] * p if isinstance(p, int) else [1] * math.prod(p) for p in layout]
    kinds = [kind for run in runs for kind in run]
    grid = [(t, 2 * h, 2 * w) for t, h, w in (p for p in layout if not isinstance(p, int))]
    ids = torch.tensor([[processor.image_id if kind else 1 for kind in kinds]])
    grid = torch.tensor(grid) if grid else None
    expected, delta = model.get_rope_index(ids, torch.tensor([kinds]), image_grid_thw=grid)
    positions = mrope_positions(layout)
    assert torch.equal(positions, expected[:, 0])
    assert positions.max() + 1 == len(kinds) + delta


def test_positions_of_a_small_example_done_by_hand():
    """Two text tokens, an image of 2 rows and 3 columns, one text token."""
    assert mrope_positions([2, (1, 2, 3), 1]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def video_positions(config, layout, seconds):
    """transformers' positions of Qwen2.5-VL; videos in tokens, `seconds` of each one's moments."""
    kinds = [k for p in layout for k in ([0] * p if isinstance(p, int) else [2] * math.prod(p))]
    grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in (p for p in layout if type(p) is tuple)])
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).model
    ids, kinds = torch.ones(1, len(kinds), dtype=torch.int64), torch.tensor([kinds])
    found, _ = model.get_rope_index(
        ids, kinds, video_grid_thw=grid, second_per_grid_ts=torch.tensor(seconds)
    )
    return found[:, 0]


@pytest.mark.parametrize(
    "layout, seconds",
    [
        ([3, (2, 4, 6), 7], [1.0]),
        ([2, (3, 5, 9), 2, (2, 3, 7), 4], [0.5, 2.0]),
        ([1, (7, 2, 7), 3], [0.4]),  # 7 moments, 0.8 positions each: two share one
    ],
)
def test_time_of_a_qwen2_5_video_goes_by_seconds_as_in_transformers(tmp_path, layout, seconds):
    """With tokens_per_second 2. Stills and Qwen2-VL's videos count moments."""
    config = AutoConfig.from_pretrained(make_checkpoint(tmp_path, family="qwen2_5_vl"))
    config.vision_config.tokens_per_second, left = 2, iter(seconds)
    timed = [p if isinstance(p, int) else (*p, 2 * next(left)) for p in layout]
    expected = video_positions(config, layout, seconds)
    assert torch.equal(mrope_positions(timed), expected)
    assert not torch.equal(mrope_positions(layout), expected) or 2 * seconds[0] == 1


def test_text_after_a_long_video_goes_on_from_its_largest_position(tmp_path):
    """Moments 0, 5, 10 from position 1; then text from 12. transformers since 5.3 starts the text
    at 3, inside of the video; the positions of the video itself are the same."""
    found = mrope_positions([1, (3, 2, 2, 5.0), 2])
    assert found[0].tolist() == [0, *[1] * 4, *[6] * 4, *[11] * 4, 12, 13]
    assert found[:, -2:].tolist() == [[12, 13]] * 3
    config = AutoConfig.from_pretrained(make_checkpoint(tmp_path, family="qwen2_5_vl"))
    config.vision_config.tokens_per_second = 2
    expected = video_positions(config, [1, (3, 2, 2), 2], [2.5])
    assert torch.equal(found[:, :13], expected[:, :13])


def test_positions_of_a_whole_prompt_equal_transformers(folder, processor):
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).model
    images = (picture(56, 140), picture(300, 80), picture(28, 112))
    for count in range(1, 4):
        prompt = processor.prompt(Example("which is largest?", "1", images[:count]))
        ids = prompt.ids[None]
        kinds = (ids == processor.image_id).int()
        expected, delta = model.get_rope_index(ids, kinds, image_grid_thw=prompt.grid)
        assert torch.equal(prompt.positions, expected[:, 0])
        assert prompt.next_position == len(prompt.ids) + int(delta)


# ---- processor ----

IMAGES = (picture(56, 84), picture(112, 112), picture(90, 30))
TEXTS = [
    "How many items are there in the image?",
    "  two blanks before, a newline after\n",
    "\n\nnewlines first",
    " \n mixed white space \t\n\n  and more   ",
    "İstanbul, naïve, 数学, пять, e\u0301 (combining), \u0301 alone, 🙂",
    "don't 12,345.67 + x_1^2 = \\frac{a}{b} {Question} {braces}",
    "a" * 300,
]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_text_and_ids_equal_those_of_the_published_chat_template(processor, tokenizer, text, count):
    """Image tokens apart, tokenising piece by piece equals tokenising the whole string."""
    content = [{"type": "image"}] * count + [{"type": "text", "text": text}]
    message = [{"role": "user", "content": content}]
    expected = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = processor.prompt(Example(text, "1", IMAGES[:count]))
    assert prompt.text == expected
    assert prompt.ids.tolist() == oracle_ids(tokenizer, expected, IMAGES[:count])


def test_a_question_that_starts_with_a_newline_is_joined_to_the_newline_before_it(tmp_path):
    """Without an image nothing stands between "user\\n" and the question; "\\n\\n" is a token."""
    make_tokenizer(tmp_path, corpus=[*CORPUS, "a\n\n\n" * 50])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    prompt = Processor.from_pretrained(tmp_path, "{Question}").prompt(Example("\nWhy?", "1"))
    assert prompt.ids.tolist() == tokenizer(prompt.text)["input_ids"]


def test_a_text_only_prompt_is_written_out_in_full(processor):
    assert processor.prompt(Example("Why?", "1")).text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_in_a_question_stay_text(processor):
    plain = processor.prompt(Example("x", "1", IMAGES[:1])).ids.tolist()
    special = set(range(processor.vocab_size - len(SPECIAL), processor.vocab_size))
    for word in [*SPECIAL, "<image>", "<|vision_start|><|image_pad|><|vision_end|>"]:
        prompt = processor.prompt(Example(f"see {word} here", "1", IMAGES[:1]))
        ids = prompt.ids.tolist()
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert ids[prompt.image_at[0] :].count(processor.image_id) == len(prompt.image_at)
        assert processor.tokenizer.decode(processor.encode(word)) == word


def test_the_template_says_where_pictures_stand_and_what_the_system_is(folder, tokenizer):
    processor = Processor.from_pretrained(folder, "{Question} See: {Image}!", system="Be short.")
    before, after = ({"type": "text", "text": text} for text in ("Why? See: ", "!"))
    parts = [before, {"type": "image"}, after]
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = processor.prompt(Example("Why?", "1", IMAGES[:1]))
    assert prompt.text == expected
    assert prompt.ids.tolist() == oracle_ids(tokenizer, expected, IMAGES[:1])


def test_a_row_may_bring_its_own_system_message(processor):
    own = processor.prompt(Example("Why?", "1", extra={"system": "Be kind."})).text
    assert own.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")


def test_a_processor_stays_the_same_when_it_is_sent_to_another_process(processor):
    """Pickling a tokenizer loses its encode_special_tokens."""
    again = pickle.loads(pickle.dumps(processor))
    assert again.encode("see <|image_pad|>") == processor.encode("see <|image_pad|>")
    assert vars(again).keys() == vars(processor).keys()


def test_a_prompt_that_is_too_long_is_refused_with_row_and_length_never_cut(processor):
    example = Example("q", "1", IMAGES[1:2], row="world:A#3")
    length = len(processor.prompt(example).ids)
    assert len(processor.prompt(example, max_length=length).ids) == length
    with pytest.raises(ValueError, match=rf"world:A#3: the prompt has {length} tokens \(16 of"):
        processor.prompt(example, max_length=length - 1)


def test_the_length_of_a_prompt_is_known_without_decoding_a_picture(processor, tmp_path):
    """Also of a file whose pixels are missing, and of one that EXIF turns."""
    path, turned = tmp_path / "a.png", tmp_path / "turned.jpg"
    Image.fromarray(picture(112, 168)).save(path)
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(picture(60, 300)).save(turned, exif=tag)
    whole = [path.read_bytes(), Image.fromarray(picture(56, 84)), *IMAGES, str(turned)]
    for images in ([], whole[:1], whole):
        example = Example("How many?", "1", tuple(images), row="r:1")
        assert processor.length(example) == len(processor.prompt(example).ids)
    cut = Example("How many?", "1", (whole[0][:200],))
    assert processor.length(cut) == processor.length(Example("How many?", "1", (whole[0],)))


def test_rows_that_are_too_long_are_refused_or_left_out_never_cut(processor, capsys):
    rows = [Example("word " * n, "1", row=f"r:{n}") for n in (1, 90, 2, 80)]
    most = processor.length(rows[2])
    assert without_long(rows, processor.length, "max_prompt", None, "refuse") is rows
    assert without_long(rows, processor.length, "max_prompt", 9999, "refuse") is rows
    told = rf"2 of 4 rows have more than {most} tokens, the first is r:90 .*; raise --max_prompt"
    with pytest.raises(ValueError, match=told):
        without_long(rows, processor.length, "max_prompt", most, "refuse")
    for some in (rows, tuple(rows)):  # in memory, or read on demand
        left = without_long(some, processor.length, "max_prompt", most, "skip")
        assert len(left) == 2 and [left[0], left[1]] == [rows[0], rows[2]]
        assert list(left) == [rows[0], rows[2]]
        assert "2 of 4 rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match="4 of 4 rows"):
        without_long(rows, processor.length, "max_prompt", 5, "skip")


def test_a_damaged_image_is_refused_with_its_row_and_file(processor, tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(picture(112, 112)).save(path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"rows\.jsonl:5: image .*half\.png: "):
        processor.prompt(Example("q", "1", (str(path),), row="rows.jsonl:5"))


def test_text_is_decoded_up_to_the_first_stop_token(processor):
    ids = processor.encode("<answer> 3 </answer>")
    assert processor.decode(ids) == "<answer> 3 </answer>"
    for stop in processor.stop_ids:
        assert processor.decode([*ids, stop, *ids]) == "<answer> 3 </answer>"
    box = processor.tokenizer.token_to_id("<|box_start|>")
    assert processor.decode([box, *ids]) == "<|box_start|><answer> 3 </answer>"


def test_both_of_qwens_end_tokens_stop_and_the_turns_own_comes_first(processor):
    names = [processor.tokenizer.id_to_token(i) for i in processor.stop_ids]
    assert names == ["<|im_end|>", "<|endoftext|>"]


def test_end_tokens_are_gathered_from_every_file_that_names_one(folder, tmp_path):
    make_tokenizer(tmp_path)
    config = {"eos_token_id": 12, "text_config": {"eos_token_id": 151645}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [386, 11]}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "<|quad_end|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    stops = Processor.from_pretrained(tmp_path).stop_ids
    assert stops == [386, 384, 384 + SPECIAL.index("<|quad_end|>"), 11, 12]


def test_vision_tokens_and_turn_starts_are_banned_and_stop_and_box_tokens_are_not(processor):
    names = {processor.tokenizer.id_to_token(i) for i in processor.banned_ids}
    assert names == {"<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                     "<|image_pad|>", "<|video_pad|>"}
    assert processor.image_id in processor.banned_ids
    assert processor.vocab_size == 384 + len(SPECIAL)


# ---- files of a checkpoint ----


def test_rows_of_the_embedding_beyond_the_last_token_are_banned(folder, tmp_path):
    make_checkpoint(tmp_path, padded_vocab=405)
    few, more = (Processor.from_pretrained(f) for f in (folder, tmp_path))
    assert more.banned_ids == [*few.banned_ids, *range(398, 405)]
    assert more.vocab_size == few.vocab_size == 398
    flat = json.loads((tmp_path / "config.json").read_text())["text_config"]  # as on the hub
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert Processor.from_pretrained(tmp_path).banned_ids == more.banned_ids


def test_what_was_read_is_saved_byte_for_byte(folder, tmp_path):
    Processor.from_pretrained(folder).save_pretrained(tmp_path / "new")
    saved = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert saved == ["generation_config.json", "preprocessor_config.json", "tokenizer.json",
                     "tokenizer_config.json"]
    for name in saved:
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()


def test_a_saved_processor_makes_the_same_prompts_here_and_in_transformers(folder, tmp_path):
    first = Processor.from_pretrained(folder, min_pixels=6272, max_pixels=9000)
    first.save_pretrained(tmp_path)
    example = Example("q", "1", (picture(300, 200), picture(20, 20)))
    expected = first.prompt(example)
    assert expected.grid.tolist() == [[1, 4, 8], [1, 6, 6]]
    again = Processor.from_pretrained(tmp_path).prompt(example)
    assert torch.equal(again.patches, expected.patches) and torch.equal(again.ids, expected.ids)
    out = AutoImageProcessor.from_pretrained(tmp_path)(list(example.images), return_tensors="pt")
    assert torch.equal(out["pixel_values"], expected.patches)


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 6272, "max_pixels": 7840},
        {"size": {"shortest_edge": 6272, "longest_edge": 7840}},
        {"size": {"min_pixels": 6272, "max_pixels": 7840}},
        {"min_pixels": 6272, "max_pixels": 7840, "size": {"min_pixels": 1, "max_pixels": 9**9}},
    ],
)
def test_pixel_limits_are_read_under_old_and_new_names(folder, tmp_path, limits):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "preprocessor_config.json").write_text(json.dumps(limits))
    example = Example("q", "1", (picture(200, 200), picture(28, 28)))
    expected, grid = oracle_patches(list(example.images), min_pixels=6272, max_pixels=7840)
    prompt = Processor.from_pretrained(copy).prompt(example)
    assert torch.equal(prompt.patches, expected) and torch.equal(prompt.grid, grid)
    Processor.from_pretrained(copy).save_pretrained(tmp_path / "new")
    kept = (tmp_path / "new" / "preprocessor_config.json").read_text()
    assert json.loads(kept) == limits


def test_settings_that_only_the_combined_file_of_transformers_5_holds_are_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 6272, "longest_edge": 7840}
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    processor = Processor.from_pretrained(copy)
    assert (processor.settings["min_pixels"], processor.settings["max_pixels"]) == (6272, 7840)
    processor.save_pretrained(tmp_path / "new")
    assert AutoImageProcessor.from_pretrained(tmp_path / "new").size["longest_edge"] == 7840
    (copy / "preprocessor_config.json").write_text('{"max_pixels": 9999}')
    theirs = AutoImageProcessor.from_pretrained(copy).size["longest_edge"]
    assert Processor.from_pretrained(copy).settings["max_pixels"] == theirs == 7840
    Processor.from_pretrained(copy, max_pixels=7000).save_pretrained(tmp_path / "newer")
    assert AutoImageProcessor.from_pretrained(tmp_path / "newer").size["longest_edge"] == 7000


def test_other_means_scales_and_filters_are_followed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = {"image_mean": [0.5, 0.25, 0.1], "image_std": [0.5, 1.0, 0.3], "resample": 2,
             "rescale_factor": 1 / 128, "do_normalize": True}
    (copy / "preprocessor_config.json").write_text(json.dumps(other))
    image = picture(100, 100)
    prompt = Processor.from_pretrained(copy).prompt(Example("q", "1", (image,)))
    assert torch.equal(prompt.patches, oracle_patches([image], **other)[0])
    other |= {"do_normalize": False, "do_rescale": False}
    (copy / "preprocessor_config.json").write_text(json.dumps(other))
    prompt = Processor.from_pretrained(copy).prompt(Example("q", "1", (image,)))
    assert torch.equal(prompt.patches, oracle_patches([image], **other)[0].float())


def test_qwens_defaults_hold_where_there_is_no_preprocessor_file_and_are_saved(tmp_path):
    processor = Processor.from_pretrained(make_tokenizer(tmp_path / "a"))
    processor.save_pretrained(tmp_path / "b")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "b")
    image = picture(1500, 1200)  # above the default limit
    expected, _ = oracle_patches([image])
    assert torch.equal(loaded([image], return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor.prompt(Example("q", "1", (image,))).patches, expected)


def test_pixel_limits_that_exclude_each_other_are_refused(folder):
    with pytest.raises(ValueError, match=r"min_pixels <= max_pixels, found 3136 and 1000"):
        Processor.from_pretrained(folder, max_pixels=1000)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no tokenizer\.json"):
        Processor.from_pretrained(tmp_path)


def test_a_tokenizer_without_vision_tokens_is_refused(tmp_path):
    make_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("<|vision_start|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no <\|vision_start\|>"):
        Processor.from_pretrained(tmp_path)


def test_a_model_with_another_image_token_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"image_token_id": 5}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json's image token is 5, the tokenizer's 396"):
        Processor.from_pretrained(copy)


def test_a_broken_file_of_a_checkpoint_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "preprocessor_config.json").write_text('{"size":')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
        Processor.from_pretrained(copy)
