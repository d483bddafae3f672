"""Build hook: compiles the deformable attention for CPUs into the wheel where a C compiler is, and goes on without it where not."""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface):
    """Runs for wheels and editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel with a library is for this platform alone."""
        del version
        if self.target_name != "wheel":
            return
        build = self._load_build_module()
        folder = Path(self.root) / "mpformer_hf" / "ops" / "lib"
        for outdated in folder.glob("*.so"):
            if outdated.name not in {build.library_name(kind) for kind in build.KINDS}:
                outdated.unlink()
        if os.environ.get(build.SWITCH) == "0":
            return
        try:
            path = build.build_library("cpu", folder)
        except (build.BuildError, OSError) as error:
            self.app.display_warning(
                "The deformable attention was not compiled; it will be at first use, if there is a compiler then, or run on "
                f"plain PyTorch: {error}"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["force_include"][str(path)] = f"mpformer_hf/ops/lib/{path.name}"

    def _load_build_module(self) -> ModuleType:
        """The module by its path: importing the package would need torch."""
        path = Path(self.root) / "mpformer_hf" / "ops" / "build.py"
        spec = importlib.util.spec_from_file_location("mpformer_ops_build", path)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"Expected {path}, which is part of every checkout and source distribution.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
