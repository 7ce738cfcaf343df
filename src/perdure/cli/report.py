"""perdure report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from perdure.cli.console import Command, Screen
from perdure.storage.schema import SPECIALISTS


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write report.html for one or several runs."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDERS")]
    """Runs' folders, or a grid's."""
    out: Path | None = None
    """The file; report.html in the first folder when left out."""
    figures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder for the figures as PDF and PNG, for papers."""
    features: bool = False
    """Into --figures also a picture a task of test features before and after it (t-SNE); reads model and images."""
    csv: bool = False
    """Tables as CSV too: methods, runs, scores, classes, confusion and significance, into --figures or beside --out."""
    latex: bool = False
    """The table of methods for LaTeX too, into the same folder."""

    def __call__(self, screen: Screen) -> None:
        """Write and print the path."""
        from perdure.reporting.report import write_report

        if self.features and not self.figures:
            raise ValueError("--features needs a folder for the pictures: give --figures DIR too")
        if self.out and not (self.out.suffix in (".html", ".htm") or self.out.is_dir()):
            raise ValueError(
                f"--out {self.out}: a report is HTML: give a name that ends in .html; --figures writes PDF"
            )
        if teams := [folder for folder in self.folders if (folder / SPECIALISTS).is_file()]:
            self._team(teams[0], screen)
            return
        inner = [run for folder in self.folders for run in _runs_in(folder)]
        path = write_report(inner, self.out or self.folders[0] / "report.html", self.figures, screen.note)
        screen.result({"report": str(path)}, f"report: {path}")
        if self.features and self.figures:
            from perdure.api.feature_maps import draw_features

            for run in inner:
                for file in draw_features(run, self.figures, screen.note):
                    screen.result({"figure": str(file)}, f"figure: {file}")
        if self.csv or self.latex:
            from perdure.reporting.papers import write_tables

            place = self.figures or path.parent / "tables"
            for file in write_tables(inner, place, as_csv=self.csv, as_latex=self.latex):
                screen.result({"table": str(file)}, f"table: {file}")

    def _team(self, folder: Path, screen: Screen) -> None:
        from perdure.reporting.specialists import write_team_report

        idle = [f"--{name}" for name in ("figures", "csv", "latex") if getattr(self, name)]
        if len(self.folders) > 1 or idle:
            raise ValueError(
                f"{folder} holds specialists, of which a report shows a table: give it alone"
                + (f", without {' and '.join(idle)}" if idle else "")
            )
        path = write_team_report(folder, self.out or folder / "report.html")
        screen.result({"report": str(path)}, f"report: {path}")


def _runs_in(folder: Path) -> list[Path]:
    from perdure.core.manifests import RECORD, runs_in

    inner = runs_in(folder)
    if (folder / RECORD).exists():
        return [folder]
    if not inner:
        raise ValueError(f"{folder} is neither a run's nor a grid's folder: it has no run.json")
    return inner
