"Packages the library; every field comes from settings.ini."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
next_minor = int(cfg['max_python'].split('.')[1]) + 1


class BuildWithAssets(build_py):
    "The pictures and weights stand beside the package; a wheel carries them inside it."
    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(here/'assets', Path(self.build_lib, cfg['lib_path'], 'assets'), dirs_exist_ok=True)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license={'apache2': 'Apache-2.0'}[cfg['license']],
    keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}"],
    python_requires=f">={cfg['min_python']},<3.{next_minor}",
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass={'build_py': BuildWithAssets},
    zip_safe=False,
)
