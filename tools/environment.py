"""Make .venv from requirements-dev.lock, or see at once that it is there.

Plain Python without packages: it runs before anything is installed, also on versions that are too old for the course.
A marker inside .venv, written last, says what it was made from; an environment without it was interrupted and is made anew.
"""
import hashlib, json, os, re, shutil, subprocess, sys

LOCK, VENV = 'requirements-dev.lock', '.venv'
MARKER, LOG = os.path.join(VENV, 'made-from.json'), os.path.join(VENV, 'install.log')
PYTHON = os.path.join(VENV, *(('Scripts', 'python.exe') if os.name == 'nt' else ('bin', 'python')))
UNREACHABLE = re.compile(r'failed to fetch|could not connect|connection|dns error|error sending request|name or service not known|'
                         r'name resolution|nodename nor servname|network|proxy|timed out|no matching distribution', re.I)
SHOWN = re.compile(r'\s*(Downloading .*\d\d[\d.]* ?Mi?B|Installing|(Resolved|Prepared|Installed) \d+ packages)')


class Failed(Exception): "A reason in one sentence."

def say(what):
    sys.stdout.write(what + '\n')
    sys.stdout.flush()


def wanted():
    "What the environment has to be made from: hashes of the lock and of the project's own metadata."
    def digest(*names):
        h = hashlib.sha256()
        for name in names:
            with open(name, 'rb') as f: h.update(f.read())
        return h.hexdigest()
    return {'lock': digest(LOCK), 'project': digest('settings.ini', 'setup.py', 'pyproject.toml'), 'folder': os.getcwd()}


def made():
    "What the environment was made from; empty if it is missing or half there."
    try:
        with open(MARKER) as f: return json.load(f) if os.path.exists(PYTHON) else {}
    except (EnvironmentError, ValueError): return {}


def check_python(version=sys.version_info):
    with open('settings.ini') as f: low, high = re.findall(r'(?m)^m(?:in|ax)_python *= *([\d.]+)', f.read())
    parts = lambda s: tuple(int(o) for o in s.split('.'))
    if not parts(low) <= tuple(version[:2]) <= parts(high):
        raise Failed('Python {}.{} is too {}: this course needs {} to {}; name one that you have, as in `make demo PYTHON=python{}`.'.format(
            version[0], version[1], 'old' if tuple(version[:2]) < parts(low) else 'new', low, high, high))


def run(*command):
    "Run one installer command: everything goes to the log, its milestones to the screen, a failure becomes one sentence."
    lines, outside = [], ('PIP_USER', 'PIP_TARGET', 'PIP_PREFIX', 'PYTHONPATH', 'PYTHONHOME', 'UV_SYSTEM_PYTHON')   # would lead out of .venv
    env = {k: v for k, v in os.environ.items() if k not in outside}
    with open(LOG, 'a', encoding='utf-8') as log:
        proc = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, encoding='utf-8', errors='replace')
        try:
            for line in proc.stdout:
                log.write(line); lines.append(line)
                if SHOWN.match(line): say('  ' + line.strip()[:100])
        finally:
            if proc.poll() is None and sys.exc_info()[0]: proc.terminate()
            code = proc.wait()
    if not code: return
    said = ''.join(lines)
    if re.search('no space left', said, re.I):
        raise Failed('The disk is full: the environment needs about 6 GB (details: {}).'.format(LOG))
    if UNREACHABLE.search(said):
        raise Failed('The package registry cannot be reached: check the network or the proxy, then repeat the command (details: {}).'.format(LOG))
    raise Failed('Installing failed: {} (details: {}).'.format((said.strip().splitlines() or ['no message'])[-1], LOG))


def make(want):
    "A new environment with exactly the lock's versions."
    uv = shutil.which('uv')
    say('Making {} with {}: about 170 packages, 6 GB on Linux; one to five minutes, the first time only.'.format(VENV, 'uv' if uv else 'pip'))
    shutil.rmtree(VENV, ignore_errors=True)
    os.makedirs(VENV, exist_ok=True)
    if uv:
        run(uv, 'venv', '--quiet', '--allow-existing', '--python', sys.executable, VENV)
        run(uv, 'pip', 'sync', '--python', PYTHON, '--require-hashes', LOCK)
    else:
        run(sys.executable, '-m', 'venv', VENV)
        run(PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check', '--retries', '2', '--require-hashes', '-r', LOCK)
    install_project(want)


def install_project(want):
    "The project itself, editable; its dependencies are there already."
    uv = shutil.which('uv')
    pip = [uv, 'pip', 'install', '--python', PYTHON] if uv else [PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check']
    run(*(pip + ['--no-deps', '--no-build-isolation', '--editable', '.']))
    with open(MARKER + '.part', 'w') as f: json.dump(want, f)
    os.replace(MARKER + '.part', MARKER)
    say('{} is ready.'.format(VENV))


def main():
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
    want, have = wanted(), made()
    if want == have: return
    if all(want[k] == have.get(k) for k in ('lock', 'folder')): return install_project(want)
    check_python()
    make(want)


if __name__ == '__main__':
    try: main()
    except Failed as e: sys.exit('Stopped: {}'.format(e))
    except KeyboardInterrupt: sys.exit('Stopped by Ctrl-C; the next run starts {} anew.'.format(VENV))
