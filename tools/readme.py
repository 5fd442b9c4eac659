"""Write README.md from nbs/index.ipynb, and the index's table of lessons from the lessons' own titles.

usage: python tools/readme.py
"""
import json, posixpath, re
from pathlib import Path

HEAD = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n'
TABLE = '| no. | lesson | what it is about |\n|---|---|---|'


def title(path):
    "A notebook's title and its one-line subtitle."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    src = next((s for s in (''.join(c['source']) for c in cells if c['cell_type'] == 'markdown') if s.startswith('# ')), f'# {path.stem}')
    sub = re.search(r'^> *(.+)$', src, re.M)
    return src.splitlines()[0][2:].strip(), sub[1].strip() if sub else ''

def lessons(nbs):
    "The table of lessons: number, linked title, subtitle; notebooks without a number come last."
    paths = [p for p in nbs.glob('*.ipynb') if p.name != 'index.ipynb' and p.name[0] not in '._']
    number = lambda p: p.name.split('_')[0] if p.name[0].isdigit() else ''
    rows = [(number(p), p, *title(p)) for p in sorted(paths, key=lambda p: (not number(p), p.name))]
    return '\n'.join([TABLE, *(f'| {no} | [{head}]({p.name}) | {sub} |' for no, p, head, sub in rows)])

def index(nbs):
    "The index notebook with its table made anew."
    nb = json.loads((nbs/'index.ipynb').read_text(encoding='utf-8'))
    for c in nb['cells']:
        if ''.join(c['source']).startswith(TABLE): c['source'] = lessons(nbs).splitlines(keepends=True)
    return nb

def markdown(nb):
    "The notebook's text as it reads from the top folder: links lose their way through nbs/."
    away = lambda m: m[0] if re.match(r'[a-z]+:|#', m[1]) else f'({posixpath.normpath(posixpath.join("nbs", m[1]))})'
    parts = [''.join(c['source']).strip() for c in nb['cells'] if c['cell_type'] == 'markdown']
    return HEAD + re.sub(r'(?<=\])\(([^)\s]+)\)', away, '\n\n'.join(parts)) + '\n'

def complaints(root):
    nbs = Path(root, 'nbs')
    old, new = json.loads((nbs/'index.ipynb').read_text(encoding='utf-8')), index(nbs)
    bad = [] if old == new else ['nbs/index.ipynb: its table of lessons is not that of nbs/; run python tools/readme.py']
    if not any(''.join(c['source']).startswith(TABLE) for c in new['cells']): bad.append('nbs/index.ipynb: has no table of lessons')
    bad += [] if all(c['cell_type'] == 'markdown' for c in new['cells']) else ['nbs/index.ipynb: holds more than text, which README.md would lack']
    same = Path(root, 'README.md').read_text(encoding='utf-8') == markdown(new)
    return bad + ([] if same else ['README.md: not what nbs/index.ipynb says; run python tools/readme.py'])

if __name__ == '__main__':
    root = Path(__file__).resolve().parent.parent
    nb = index(root/'nbs')
    (root/'nbs/index.ipynb').write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    (root/'README.md').write_text(markdown(nb), encoding='utf-8')
