"Reading pictures: every mode and format, and everything that can be wrong with a file. All of them are made on the spot."
import io, itertools, os, subprocess, sys, warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from course_lib import paint, pictures
from course_lib.core import assets_path
from course_lib.pictures import find_picture, photo, photo_names, read_image, resize, style_image, style_names, style_paths


def encode(im, fmt, **kw):
    file = io.BytesIO()
    im.save(file, fmt, **kw)
    return file.getvalue()

def colours(h=48, w=64):
    "Smooth colours, so that JPEG hardly changes them."
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([255 * x / w, 255 * y / h, 128 + 60 * np.sin(x / 9)], -1).astype('uint8'))

def exif(turn):
    e = Image.Exif()
    e[0x0112] = turn
    return e

def error(source, **kw):
    with pytest.raises((ValueError, OSError)) as e: read_image(source, **kw)
    message = str(e.value)
    assert len(message) < 300 and '\n' not in message and 'object at 0x' not in message
    return e.type, message


# conversions

GRAY, RGB = colours().convert('L'), colours()
MODES = ['1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK', 'I;16', 'I', 'F']
FORMATS = {'PNG': {'1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'I;16'}, 'JPEG': {'L', 'RGB', 'CMYK'}, 'TIFF': set(MODES), 'WEBP': {'RGB', 'RGBA'}, 'GIF': {'1', 'L', 'P', 'RGB'},
           'BMP': {'1', 'L', 'P', 'RGB'}, 'PPM': {'1', 'L', 'RGB', 'I;16'}, 'AVIF': {'RGB', 'RGBA'}, 'JPEG2000': {'L', 'RGB', 'RGBA'}}

def as_mode(mode):
    if mode == 'I;16': return Image.fromarray(np.asarray(GRAY).astype('uint16') * 257)
    if mode == 'I': return Image.fromarray(np.asarray(GRAY).astype('int32') * 257)
    if mode == 'F': return Image.fromarray(np.asarray(GRAY).astype('float32') / 255)
    return RGB.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == 'P' else RGB.convert(mode)

@pytest.mark.parametrize('fmt,mode', [(f, m) for f in FORMATS for m in MODES if m in FORMATS[f]])
def test_every_mode_of_every_format(fmt, mode, tmp_path):
    if fmt not in Image.SAVE: Image.init()
    if fmt not in Image.SAVE: pytest.skip(f'this Pillow has no {fmt}')
    path = tmp_path/f'picture.{fmt.lower()}'
    path.write_bytes(encode(as_mode(mode), fmt, **(dict(quality=95) if fmt in ('JPEG', 'WEBP', 'AVIF') else {})))
    x = read_image(path)
    wanted = RGB if mode in ('RGB', 'RGBA', 'P', 'CMYK') else GRAY
    wanted = torch.from_numpy(np.array(wanted.convert('RGB'))).permute(2, 0, 1) / 255
    assert x.shape == (3, 48, 64) and x.dtype == torch.float32 and x.is_contiguous()
    assert 0 <= x.min() and x.max() <= 1
    if mode == '1': assert set(x.unique().tolist()) == {0, 1} and abs(x.mean() - wanted.mean()) < .02
    else: assert (x - wanted).abs().mean() < .035

@pytest.mark.parametrize('top,white', [(4095, 4095 / 65535), (65535, 1)])
def test_16_bit_is_scaled_by_its_range(top, white):
    a = np.linspace(0, top, 256).astype('uint16').reshape(16, 16)
    for fmt in 'PNG', 'TIFF':
        x = read_image(encode(Image.fromarray(a), fmt))
        assert torch.allclose(x[0], torch.from_numpy(a / np.float32(65535)), atol=1e-6) and abs(x.max() - white) < 1e-6

def test_big_endian_16_bit():
    a = np.arange(0, 65535, 257, dtype='uint16')[:255].reshape(15, 17)
    data = b'P5 17 15 65535\n' + a.astype('>u2').tobytes()
    assert torch.allclose(read_image(data)[1], torch.from_numpy(a / np.float32(65535)), atol=1e-5)

def test_strange_floats():
    a = np.float32([[np.nan, -np.inf, np.inf, -2, 3]])
    assert torch.allclose(read_image(encode(Image.fromarray(a), 'TIFF'))[0], torch.tensor([[.4, .4, .4, 0, 1]]))
    assert read_image(encode(Image.fromarray(np.full((2, 2), 7, np.float32)), 'TIFF')).unique().tolist() == [0]

@pytest.mark.parametrize('kind', ['rgba', 'la', 'palette', 'colour key', 'gray key', 'webp'])
def test_transparent_becomes_white(kind):
    black = Image.new('RGB', (8, 8))
    clear = Image.new('L', (8, 8), 0)
    if kind == 'rgba': im = black.convert('RGBA'); im.putalpha(clear); data = encode(im, 'PNG')
    if kind == 'webp': im = black.convert('RGBA'); im.putalpha(clear); data = encode(im, 'WEBP', lossless=True)
    if kind == 'la': im = black.convert('LA'); im.putalpha(clear); data = encode(im, 'PNG')
    if kind == 'palette': data = encode(black.convert('P'), 'PNG', transparency=black.convert('P').getpixel((0, 0)))
    if kind == 'colour key': data = encode(black, 'PNG', transparency=(0, 0, 0))
    if kind == 'gray key': data = encode(black.convert('L'), 'PNG', transparency=0)
    assert read_image(data).unique().tolist() == [1]

@pytest.mark.parametrize('turn,fmt', list(itertools.product(range(1, 9), ('JPEG', 'PNG', 'WEBP', 'TIFF'))))
def test_orientation(turn, fmt):
    upright = torch.from_numpy(np.array(RGB)).permute(2, 0, 1) / 255
    lie = {1: lambda o: o, 2: lambda o: o.flip(-1), 3: lambda o: o.flip(-1, -2), 4: lambda o: o.flip(-2), 5: lambda o: o.transpose(-1, -2),
           6: lambda o: o.rot90(1, (-2, -1)), 7: lambda o: o.transpose(-1, -2).flip(-1, -2), 8: lambda o: o.rot90(-1, (-2, -1))}[turn]
    stored = Image.fromarray((lie(upright).permute(1, 2, 0) * 255).round().byte().contiguous().numpy())
    data = encode(stored, fmt, exif=exif(turn), **(dict(quality=95) if fmt in ('JPEG', 'WEBP') else {}))
    assert (read_image(data) - upright).abs().mean() < .02
    assert (read_image(data, (12, 20)) - resize(upright, (12, 20))).abs().mean() < .02
    assert read_image(data, 32).shape == (3, 24, 32)

@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_broken_exif_is_no_reason_to_refuse():
    assert read_image(encode(RGB, 'JPEG', exif=b'Exif\0\0MM\0*\0\0\0\xff' + b'\xff' * 40)).shape == (3, 48, 64)
    assert read_image(encode(RGB, 'JPEG', exif=exif(99))).shape == (3, 48, 64)

@pytest.mark.parametrize('fmt', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_animation_gives_its_first_frame_and_a_warning(fmt, tmp_path):
    path = tmp_path/f'film.{fmt.lower()}'
    path.write_bytes(encode(RGB, fmt, save_all=True, append_images=[Image.new('RGB', RGB.size, o) for o in ('red', 'blue')]))
    with pytest.warns(UserWarning, match=f'film.{fmt.lower()} has 3 frames; the first is read'): x = read_image(path)
    assert (x - torch.from_numpy(np.array(RGB)).permute(2, 0, 1) / 255).abs().mean() < .05

def test_a_phone_file_with_two_views_is_no_animation():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(encode(RGB, 'MPO', save_all=True, append_images=[RGB])).shape == (3, 48, 64)

def test_colour_profile_does_no_harm():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    assert read_image(encode(RGB, 'PNG', icc_profile=profile)).equal(read_image(encode(RGB, 'PNG')))


# sizes

def test_one_pixel():
    dot = encode(Image.new('RGB', (1, 1), 'red'), 'PNG')
    assert read_image(dot).flatten().tolist() == [1, 0, 0]
    assert read_image(dot, 32).shape == (3, 32, 32)
    assert error(dot, min_size=32)[1] == 'the picture is 1 x 1 pixels, read at 1 x 1; its shorter side must be at least 32'
    assert 'at least 32' in error(dot, size=256, min_size=32)[1]      # enlarging makes no details

def test_a_line_20000_pixels_long():
    line = encode(Image.new('RGB', (20_000, 1), 'teal'), 'PNG')
    assert read_image(line).shape == (3, 1, 20_000)
    assert read_image(line, 512).shape == (3, 1, 512)
    assert error(line, size=512, min_size=16)[1] == 'the picture is 20000 x 1 pixels, read at 512 x 1; its shorter side must be at least 16'

@pytest.mark.parametrize('fmt,limit_mb', [('JPEG', 150), ('PNG', 700)])
def test_20000_pixels_in_little_memory(fmt, limit_mb, tmp_path):
    pytest.importorskip('resource')
    path = tmp_path/f'wide.{fmt.lower()}'
    Image.new('RGB', (20_000, 5_000), (200, 100, 50)).save(path)      # 1.2 GB as floats
    code = ('import resource, sys; from course_lib.pictures import read_image, photo; read_image(sys.argv[2], 64)\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'x = read_image(sys.argv[1], 512); after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'print(*x.shape, (after - before) // (1024 if sys.platform != "darwin" else 1 << 20))')
    small = tmp_path/'small.jpg'
    RGB.save(small)
    run = subprocess.run([sys.executable, '-c', code, str(path), str(small)], capture_output=True, text=True, check=True)
    *shape, mb = map(int, run.stdout.split())
    assert shape == [3, 128, 512] and mb < limit_mb, f'{mb} MB'

def test_shrinking_while_decoding_gives_the_same_picture():
    big = encode(colours(1200, 1600), 'JPEG', quality=95)
    for size in 100, 333, (90, 120), (50, 400): assert (read_image(big, size) - resize(read_image(big), size)).abs().mean() < .006

def test_bombs_are_refused_in_a_sentence():
    bomb = encode(Image.new('1', (40_000, 30_000)), 'PNG')
    for size in None, 64:
        kind, message = error(bomb, size=size)
        assert kind is ValueError and '40000 x 30000 = 1,200 million pixels' in message and 'the limit is 100 million' in message
    assert 'the limit is 0 million' in error(encode(RGB, 'PNG'), max_pixels=100)[1]
    assert Image.MAX_IMAGE_PIXELS                                     # Pillow's guard is back

def test_a_bomb_of_text_in_a_png():
    info = PngImagePlugin.PngInfo()
    info.add_text('comment', 'a' * 80_000_000, zip=True)
    data = encode(RGB, 'PNG', pnginfo=info)
    assert len(data) < 200_000
    try: assert read_image(data).shape == (3, 48, 64)
    except ValueError as e: assert 'the picture is' in str(e)

@pytest.mark.parametrize('size', [0, -5, (10,), (10, 0), (0, 0), (3, 4, 5)])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match='longest side or'): read_image(encode(RGB, 'PNG'), size)


# refusals

def test_missing_and_folder(tmp_path):
    assert error(tmp_path/'holiday.jpg') == (FileNotFoundError, f'there is no picture file {tmp_path/"holiday.jpg"}')
    assert error(str(tmp_path)) == (IsADirectoryError, f'{tmp_path} is a folder; a picture file is needed')

def test_no_picture_at_all(tmp_path):
    for name, data in dict(empty=b'', text=b'Dear reader,\n' * 20, zeros=bytes(5000), noise=os.urandom(5000), jpeg_start=b'\xff\xd8\xff', pdf=b'%PDF-1.7\n' * 9).items():
        path = tmp_path/f'{name}.png'
        path.write_bytes(data)
        kind, message = error(path)
        assert kind is ValueError and message.startswith(f'{name}.png is '), message

def test_formats_that_start_other_programs_are_not_opened():
    assert 'is not a picture in a known format' in error(encode(RGB, 'EPS'))[1]

@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'PPM', 'AVIF', 'JPEG2000'])
def test_cut_short_anywhere(fmt, tmp_path):
    data = encode(colours(96, 128), fmt)
    refused, path = 0, tmp_path/f'cut.{fmt.lower()}'
    for n in range(1, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:n])
        try: x = read_image(path)
        except ValueError as e: refused += 1; assert str(e).startswith(path.name) and '\n' not in str(e) and len(str(e)) < 300
        else: assert x.shape == (3, 96, 128)                         # only what came after the pixels was missing
    assert refused >= 40

@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'AVIF'])
def test_flipped_bytes_raise_nothing_but_value_errors(fmt):
    data, rng = encode(colours(), fmt), np.random.RandomState(0)
    for _ in range(60):
        broken = bytearray(data)
        for k in rng.randint(0, len(data), 4): broken[k] = rng.randint(256)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: x = read_image(bytes(broken), max_pixels=1_000_000)
            except ValueError: continue
        assert x.ndim == 3 and len(x) == 3 and x.isfinite().all()


# pictures by name

def test_photos_need_no_network(monkeypatch):
    import socket
    monkeypatch.setattr(socket, 'socket', lambda *a, **k: pytest.fail('a photo asked for the network'))
    assert photo_names() == list(pictures.PHOTOS)
    for name in photo_names():
        x = photo(name, 64)
        assert max(x.shape) == 64 and x.std() > .02

def test_styles_of_the_data_folder_come_after_the_embedded(tmp_path, monkeypatch):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path))
    embedded = style_names()
    assert embedded == sorted(paint.PAINTERS)
    (tmp_path/'pictures').mkdir()
    for name in 'mine.png', 'night.png', 'notes.txt': RGB.save(tmp_path/'pictures'/name, 'PNG')
    assert style_names() == [*embedded, 'mine']
    assert style_paths()['night'].parent == assets_path('pictures') and style_image('mine', None).shape == (3, 48, 64)

def test_find_picture(tmp_path):
    RGB.save(tmp_path/'waves.png')
    assert find_picture(tmp_path/'waves.png', None).shape == (3, 48, 64)
    assert find_picture('waves', 32).shape == (3, 32, 32)
    with pytest.raises(FileNotFoundError, match='neither a file nor a known name'): find_picture('wavs')
    with pytest.raises(IsADirectoryError): find_picture(tmp_path)


# the painted ones

@pytest.mark.parametrize('name', sorted(paint.PAINTERS))
def test_stored_pictures_are_what_the_code_paints(name):
    path = assets_path('pictures', f'{name}.jpg')
    stored = read_image(path)
    assert path.stat().st_size < 150_000 and stored.shape == (3, 512, 512)
    assert paint.psnr(stored, read_image(paint.jpeg_under(paint.PAINTERS[name]()))) > 30
    assert paint.psnr(resize(stored, 128), paint.PAINTERS[name](128, seed=12)) < 25      # another seed is far off

def test_the_card_names_every_picture_and_its_seed():
    import inspect
    card = assets_path('pictures', 'README.md').read_text(encoding='utf-8')
    for name, f in paint.PAINTERS.items(): assert f'| {name}.jpg | `{f.__name__}` | {inspect.signature(f).parameters["seed"].default} |' in card
