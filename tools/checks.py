"""What must hold for the repository. Each check takes the project's folder and returns its complaints: none means all is well."""
import ast, contextlib, json, os, re, shutil, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

import readme as readme_tool

SKIP_FLAGS = 'gpu', 'slow', 'net'   # the only reasons for which a test run may leave out a cell
NUMBER = re.compile(r'(\d+)_(\w+)')


def settings(root):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(Path(root)/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def notebooks(root):
    "The published notebooks: those that nbdev exports, tests and renders."
    return sorted(p for p in Path(root, 'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(root).parts))

def read(path): return json.loads(Path(path).read_text(encoding='utf-8'))

def text(o): return ''.join(o or '')

def cells(path, kind):
    "Number, source and cell for every cell of one kind."
    return [(i, text(c['source']), c) for i, c in enumerate(read(path)['cells']) if c['cell_type'] == kind]

def python(src):
    "A code cell as plain Python: magics and shell lines become `pass`."
    if src.startswith('%%'): return ''
    return re.sub(r'^(\s*)[%!].*', r'\1pass', src, flags=re.M)

def directives(src): return {m[1]: m[2].strip() for m in re.finditer(r'^#\|\s*([\w-]+):?(.*)$', src, re.M)}

def outputs(cell):
    "Mime type and text of everything a cell shows."
    for o in cell.get('outputs', []):
        if o['output_type'] in ('stream', 'error'): yield o.get('name', 'error'), text(o.get('text') or o.get('traceback'))
        yield from ((mime, text(data) if isinstance(data, (str, list)) else json.dumps(data)) for mime, data in o.get('data', {}).items())


# --- generated files

@contextlib.contextmanager
def copy_with(root, code, *parts):
    "A temporary copy of `parts` of the project in which `code` has run."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        for part in ['settings.ini', 'pyproject.toml', *parts]:
            src = Path(root, part)
            if src.is_dir(): shutil.copytree(src, tmp/part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'out'))
            elif src.exists(): (tmp/part).parent.mkdir(parents=True, exist_ok=True); shutil.copy(src, tmp/part)
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}   # nbdev_export does nothing where IN_TEST is set
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp, env=env, capture_output=True, text=True)
        yield tmp, done.stderr.strip().splitlines()[-1:] if done.returncode else []

def differences(a, b, pattern, advice):
    "Files that two folders don't have in common."
    names = {p.relative_to(base).as_posix() for base in (a, b) for p in base.glob(pattern) if '.ipynb_checkpoints' not in p.parts}
    same = lambda n: (a/n).exists() and (b/n).exists() and (a/n).read_bytes() == (b/n).read_bytes()
    return [f'{n}: {advice}' for n in sorted(names) if not same(n)]

def exports(root):
    "The package is exactly what the notebooks export."
    lib = settings(root)['lib_path']
    with copy_with(root, 'from nbdev.doclinks import nbdev_export; nbdev_export()', 'nbs', f'{lib}/__init__.py') as (tmp, errors):
        return errors + differences(Path(root, lib), tmp/lib, '**/*.py', 'not what the notebooks export; run nbdev_export') + \
            differences(Path(root), tmp, 'pyproject.toml', 'not what settings.ini says; run nbdev_export')

def clean(root):
    "Notebooks hold no more than nbdev_clean leaves."
    with copy_with(root, 'from nbdev.clean import nbdev_clean; nbdev_clean()', 'nbs') as (tmp, errors):
        return errors + differences(Path(root, 'nbs'), tmp/'nbs', '**/*.ipynb', 'not clean; run nbdev_clean')

def readme(root):
    "README.md and the index's table of lessons are up to date."
    return readme_tool.complaints(root)


# --- the code

def layer(path):
    "A notebook's number; infinite for those without, which may lean on everything."
    m = NUMBER.fullmatch(path.stem)
    return (int(m[1]), m[2]) if m else (float('inf'), path.stem)

def imports(tree, lib):
    "Module and line of each import of the course's own modules: nested, relative and computed ones too; module '*' for a star."
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(o for o in (lib if node.level else '', node.module) if o)
            if any(a.name == '*' for a in node.names): yield '*', node.lineno
            found = [f'{base}.{a.name}' for a in node.names] if base == lib else [base]
        elif isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', '')) in ('import_module', '__import__'):
            found = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in found:
            top, _, rest = name.partition('.')
            if top == lib and rest and not rest.startswith('__'): yield rest.split('.')[0], node.lineno

def layers(root):
    "Each notebook exports one module of its own name at most; modules and lessons import from smaller numbers only, without stars."
    lib, bad = settings(root)['lib_path'], []
    number = {name: n for n, name in map(layer, notebooks(root))}
    for nb in notebooks(root):
        n, name = layer(nb)
        sources = [(f'{nb.name} cell {i}', python(src)) for i, src, _ in cells(nb, 'code')]
        module = Path(root, lib, f'{name}.py')
        if module.exists(): sources.append((module.name, module.read_text(encoding='utf-8')))
        for where, src in sources:
            for key in ('default_exp', 'export', 'exports', 'exporti'):
                if directives(src).get(key, '') not in ('', name): bad.append(f'{where}: exports to {directives(src)[key]}, not to {name}')
            try: found = list(imports(ast.parse(src), lib))
            except SyntaxError as e: bad.append(f'{where}: {e.msg}, line {e.lineno}'); continue
            for mod, line in found:
                if mod == '*': bad.append(f'{where} line {line}: imports with a star')
                elif number.get(mod, float('inf')) >= n: bad.append(f'{where} line {line}: layer {n} imports {mod}, which is not below it')
    return bad

def undefined(root):
    "No undefined names, neither in the modules nor in cells that a test run leaves out."
    from pyflakes import checker, messages as m
    wrong = m.UndefinedName, m.UndefinedLocal, m.UndefinedExport, m.ImportStarUsed, m.ImportStarUsage
    sources = {p.name: p.read_text(encoding='utf-8') for p in sorted(Path(root, settings(root)['lib_path']).glob('*.py'))}
    sources.update({p.name: '\n'.join(python(src) for _, src, _ in cells(p, 'code')) for p in notebooks(root)})
    def complaints(name, src):
        try: tree = ast.parse(src)
        except SyntaxError as e: return [f'{name}: {e.msg}, line {e.lineno}']
        found = checker.Checker(tree, name, builtins={'get_ipython', 'display'}).messages
        return [f'{name}: {o.message % o.message_args}' for o in found if isinstance(o, wrong)]
    return [o for name, src in sources.items() for o in complaints(name, src)]

FORKS = '''import contextlib, importlib, os, sys, traceback
others, names = (o.split() for o in sys.argv[1:])
for o in others:
    with contextlib.suppress(ImportError): importlib.import_module(o)
for name in names:
    print(f'\\0{name}', flush=True)
    if os.fork(): os.wait()
    else:
        try: importlib.import_module(name)
        except BaseException: traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)   # without the seconds in which torch tidies up'''

def foreign_imports(path):
    "Modules of other people that a module imports, as it names them."
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module

def what_modules_import(root):
    "All of that, for the whole library."
    lib = settings(root)['lib_path']
    return sorted({o for path in Path(root, lib).glob('[!_]*.py') for o in foreign_imports(path) if o.split('.')[0] != lib})

def fresh_imports(root):
    "Every module imports, silently, in a process that has imported no other of the package."
    lib = settings(root)['lib_path']
    paths = sorted(Path(root, lib).glob('[!_]*.py'))
    words = ' '.join(what_modules_import(root)), ' '.join(f'{lib}.{path.stem}' for path in paths)   # theirs once for all: they take seconds
    done = subprocess.run([sys.executable, '-c', FORKS, *words], cwd=tempfile.gettempdir(), env=dict(os.environ, PYTHONPATH=str(root)),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before, *found = done.stdout.split('\0')
    said = [(name, lines[-1]) for name, *lines in map(str.splitlines, found) if lines]
    return [f'{name}: {line}' for name, line in said] + ([] if len(found) == len(paths) else [f'stopped early: {before[-300:]}'])


# --- the pages

def stamps(root):
    "Each lesson ends with a stamp whose stored output names the code that stands above it."
    from course_lib.core import code_hash   # imports torch: not before it is needed
    bad = []
    for nb in notebooks(root):
        _, src, cell = ([(0, '', {})] + cells(nb, 'code'))[-1]
        if not NUMBER.fullmatch(nb.stem) and 'stamp(' not in src: continue
        shown = ' '.join(t for _, t in outputs(cell))
        made_by = re.search(r'code ([0-9a-f]{12})', shown)
        if not re.search(rf"^stamp\('{nb.stem}'\)$", src, re.M): bad.append(f"{nb.name}: its last cell is not stamp('{nb.stem}')")
        elif not made_by: bad.append(f'{nb.name}: its stamp has no stored output; run the notebook and keep its outputs')
        elif made_by[1] != code_hash(nb): bad.append(f'{nb.name}: its outputs were made by other code than it holds; run it again')
        elif shown.startswith('ci '): bad.append(f'{nb.name}: its outputs were made at ci scale; run it at laptop scale')
    return bad

def skipped_cells(root):
    "Notebook, cell, flag and reason of every cell that a test run leaves out."
    found = []
    for nb in notebooks(root):
        for i, src, _ in cells(nb, 'code'):
            flags = directives(src)
            said = [flags[f] for f in flags if f in SKIP_FLAGS] + re.findall(r'^#(?!\|)\s*(.+)$', src, re.M)
            why = next((o.lstrip('# ') for o in said if o), '')
            found += [(nb.name, i, f, why) for f in flags if f in (*SKIP_FLAGS, 'notest', 'skip')]
            if flags.get('eval', '').lower() == 'false':
                kind = 'blank' if '...' in src or "if __name__ == '__main__'" in src else 'eval: false'   # or a module's entry point
                found.append((nb.name, i, kind, 'an exercise'))
    return found

def skips(root):
    "Tests leave out a cell for gpu, slow or net only, each with its reason; exercises have a blank to fill in."
    bad = [f'{nb} cell {i}: left out by `{flag}`' + (' without a reason in a comment' if flag in SKIP_FLAGS else
           '; only gpu, slow, net, or an exercise with a blank (...) may be')
           for nb, i, flag, why in skipped_cells(root) if flag not in (*SKIP_FLAGS, 'blank') or not why]
    whole = re.compile(r'skip_exec:\s*true', re.I)
    bad += [f'{p.name}: is left out as a whole (skip_exec)' for p in notebooks(root) if whole.search(p.read_text(encoding='utf-8'))]
    return bad + [f'{p.relative_to(root)}: leaves out its folder' for p in Path(root, 'nbs').rglob('.notest')]

MACHINE_PATH = re.compile(r'''(^|[\s'"(=])(/(root|home|Users|tmp|work|private|var)/|[A-Z]:\\)''', re.M)

def pages(root):
    "Notebooks read well anywhere: small, no tracebacks, warnings, machine paths, widget state or html; alt text on pictures."
    bad = []
    for nb in notebooks(root):
        say = lambda what: bad.append(f'{nb.name}{what}')
        if nb.stat().st_size > 2**20: say(f': {nb.stat().st_size/2**20:.1f} MB, more than 1')
        if 'widgets' in read(nb)['metadata']: say(': widget state in its metadata')
        for i, src, _ in cells(nb, 'markdown'):
            if re.search(r'!\[\s*\]\(', src): say(f' cell {i}: a picture without alt text')
        for i, src, cell in cells(nb, 'code'):
            for mime, shown in outputs(cell):
                if mime.startswith('image/'):
                    if not directives(src).get('fig-alt'): say(f' cell {i}: a picture without alt text (#| fig-alt: ...)')
                    continue
                if mime == 'error': say(f' cell {i}: a stored traceback')
                if mime in ('text/html', 'application/javascript') or 'widget-view' in mime: say(f' cell {i}: an output of type {mime}')
                if 'Warning: ' in shown: say(f' cell {i}: a warning in its output')
                if MACHINE_PATH.search(shown): say(f' cell {i}: a path of one machine in its output')
    return bad

LINK, CODE = re.compile(r'\]\(([^)\s]+)[^)]*\)'), re.compile(r'```.*?```|`[^`\n]*`', re.S)

def links(root):
    "Relative links lead to files that exist."
    docs = [(p, '\n'.join(src for _, src, _ in cells(p, 'markdown'))) for p in notebooks(root)]
    docs += [(p, p.read_text(encoding='utf-8')) for p in Path(root).glob('*.md')]
    found = [(p, t.partition('#')[0]) for p, src in docs for t in LINK.findall(CODE.sub('', src)) if not re.match(r'[a-z]+:', t)]
    return [f'{p.name}: links to {t}, which is not there' for p, t in found if t and not (p.parent/t).exists()]


# --- metadata

def lock(root):
    "Every requirement of settings.ini is in the lock, at a version it allows."
    from packaging.requirements import Requirement
    cfg = settings(root)
    have = dict(re.findall(r'^([\w.-]+)==([\w.]+)', Path(root, 'requirements-dev.lock').read_text(encoding='utf-8'), re.M))
    asked = [Requirement(o) for key in ('requirements', 'dev_requirements') for o in cfg[key].split()]
    fits = lambda r: r.name in have and r.specifier.contains(have[r.name], prereleases=True)
    return [f'{r}: the lock has {have.get(r.name, "none")}; make it again (CONTRIBUTING.md)' for r in asked if not fits(r)]

def owner(root):
    "The owner and the address stand in settings.ini alone (and in what nbdev makes from it)."
    cfg = settings(root)
    kinds = '*.md', '*.yml', '*.toml', '*.py', 'tools/*.py', 'tests/*.py', 'nbs/*.ipynb', 'nbs/_quarto.yml', '.github/**/*.yaml'
    files = [p for kind in kinds for p in Path(root).glob(kind)]
    return [f'{p.name}: names {o}' for p in files for o in (cfg['user'], cfg['git_url']) if o in p.read_text(encoding='utf-8')]


CHECKS = dict(exports=exports, clean=clean, readme=readme, layers=layers, undefined=undefined, fresh_imports=fresh_imports,
              stamps=stamps, skips=skips, pages=pages, links=links, lock=lock, owner=owner)
