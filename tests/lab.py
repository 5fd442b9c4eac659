"""A real JupyterLab, driven by a headless browser: `with lab_server(folder) as lab, lab.notebook(cells) as page: ...`"""
import json, os, secrets, shutil, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

# no display, no sandbox (a container's root has none), and nothing that asks the network
BROWSER_FLAGS = '''--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage'''.split()

READY = '''async () => {   // the notebook is there, its kernel answers, and its widgets have been restored
    const current = () => window.jupyterapp?.shell.currentWidget?.context
    while (!current()) await new Promise(r => setTimeout(r, 100))
    await current().ready
    await current().sessionContext.ready
    await current().sessionContext.session.kernel.info
}'''


def chromium():
    "A Chromium on this machine: `COURSE_CHROMIUM`, else one on PATH, else none."
    names = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
    return os.environ.get('COURSE_CHROMIUM') or next(filter(None, map(shutil.which, names)), None)

def why_not():
    "What is missing for a live test, or ''."
    try: import jupyterlab, playwright   # noqa: F401
    except ImportError as e: return f'{e.name} is not installed'
    return '' if chromium() else 'there is no Chromium on this machine (COURSE_CHROMIUM names one)'

direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open   # this machine, whatever proxy is set

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def notebook(cells):
    "A notebook of these code cells, as a file's text."
    cells = [dict(cell_type='code', id=f'cell{i}', source=src, metadata={}, outputs=[], execution_count=None) for i, src in enumerate(cells)]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    return json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))


class Lab:
    "A running JupyterLab and a browser."
    def __init__(self, folder, url, token, browser): self.folder, self.url, self.token, self.browser = Path(folder), url, token, browser

    @contextmanager
    def notebook(self, cells, name=None):
        "Open a notebook of these code cells and wait for its kernel; yields playwright's page."
        name = name or f'live{time.time_ns()}.ipynb'
        (self.folder/name).write_text(notebook(cells), encoding='utf-8')
        page = self.browser.new_page(viewport=dict(width=1200, height=1000))
        page.set_default_timeout(30_000)
        try:
            page.goto(f'{self.url}/lab/workspaces/{Path(name).stem}/tree/{name}?token={self.token}')
            page.wait_for_function('() => window.jupyterapp')
            page.evaluate(READY)
            yield page
        finally:
            page.close()
            self._end_kernels()

    def run(self, page):
        "Run all cells; returns at once, what comes of it is awaited on the page."
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

    def save(self, page, name):
        "Save, and read the file back."
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return json.loads((self.folder/name).read_text(encoding='utf-8'))

    def _request(self, path, method='GET'):
        req = urllib.request.Request(f'{self.url}/{path}', method=method, headers={'Authorization': f'token {self.token}'})
        with direct(req, timeout=10) as r: return r.read()

    def _end_kernels(self):
        for session in json.loads(self._request('api/sessions')): self._request(f"api/sessions/{session['id']}", 'DELETE')


def _wait(url, proc, log, seconds=40):
    end = time.time() + seconds
    while time.time() < end:
        if proc.poll() is not None: break
        try: return direct(url, timeout=2).read()
        except OSError: time.sleep(.2)
    raise RuntimeError(f'JupyterLab did not start:\n{log.read_text(errors="replace")[-2000:]}')

@contextmanager
def lab_server(folder, **env):
    "JupyterLab in `folder`, on this machine only, with settings of its own; and a browser beside it."
    from playwright.sync_api import sync_playwright
    folder, token, port = Path(folder).resolve(), secrets.token_hex(16), free_port()
    url = f'http://127.0.0.1:{port}'
    with tempfile.TemporaryDirectory() as own:
        own, log = Path(own), Path(own, 'log')
        homes = {k: str(own/k) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
        command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                   f'--ServerApp.root_dir={folder}', '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=None', '--LabApp.extension_manager=readonly']
        env = {**{k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MPLBACKEND')}, **homes, **env, 'JUPYTER_TOKEN': token}   # a reader has neither
        if os.geteuid() == 0: command.append('--allow-root')
        with open(log, 'w') as out: proc = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait(f'{url}/api', proc, log)
            with sync_playwright() as p:
                browser = p.chromium.launch(executable_path=chromium(), args=BROWSER_FLAGS)
                try: yield Lab(folder, url, token, browser)
                finally: browser.close()
        finally:
            proc.terminate()
            try: proc.wait(10)
            except subprocess.TimeoutExpired: proc.kill()
