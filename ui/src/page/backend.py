"""Where answers come from: a bundle in this process, or scimlora's service. Both say what went wrong in plain words."""
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import requests

_TOO_LARGE = "This is larger than the service accepts. Send fewer cells at a time, or use `scimlora annotate` on a machine of your own."


class Problem(Exception):
    "Say in a sentence for a biologist what went wrong and what to do."


@dataclass
class Annotated:
    "Hold what came of annotating a file."
    table: pd.DataFrame  # cell_id, cell_type, confidence, unassigned, top3, reason
    notes: list = field(default_factory=list)  # what was done to the values, in words
    h5ad: bytes | None = None  # the file with the annotation added; a service sends the table only


class Local:
    """Answer with a bundle in this process.

    Parameters
    ----------
    folder : str or Path
        A bundle folder.

    Raises
    ------
    Problem
        If it is no bundle, is damaged, or belongs to another base.
    """

    where = "in this page"

    def __init__(self, folder):
        from scimlora.core import ScimloraError
        from scimlora.predict import Predictor

        self._failed = ScimloraError
        try: self._predictor = Predictor(folder)
        except ScimloraError as e: raise Problem(f"The model cannot be opened: {e}.") from None
        self.genes = list(self._predictor.genes)

    def model(self):
        "Return the manifest, with the calibration."
        bundle = self._predictor.bundle
        return {**bundle.manifest, "calibration": bundle.calibration.to_dict()}

    def ask(self, cell, units):
        "Return what cell type a dictionary of gene → value is, as `scimlora.serve.answer` does."
        from scimlora.serve import answer

        try: return answer(self._predictor, [cell], units)[0]
        except self._failed as e: raise Problem(_sentence(str(e).removeprefix("cell 0: "))) from None

    def findings(self, name, data, units):
        "Return the doctor's examination of a file, and its text for one screen."
        from scimlora.doctor import describe, examine

        def look(path):
            found = examine(path, self._predictor.base, units) | {"file": name}
            return found, describe(found)

        return self._on_file(name, data, look)

    def annotate(self, name, data, units):
        "Annotate a file and return an `Annotated`."
        from scimlora.predict import annotate_file

        def work(path):
            out = path.with_name("annotated.h5ad")
            done = annotate_file(self._predictor, path, out, units)
            return Annotated(done.table, done.notes, out.read_bytes())

        return self._on_file(name, data, work)

    def _on_file(self, name, data, job):
        from scimlora.files import read_cells
        from scimlora.guard import open_untrusted

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "upload.h5ad"
            path.write_bytes(data)
            try:
                # A child process tastes the stranger's file first: what would crash or hang this page does so there.
                open_untrusted(path, read_cells)
                return job(path)
            except self._failed as e: raise Problem(str(e).replace(f"{folder}/", "").replace(path.name, name) + ".") from None


class Remote:
    """Answer by asking scimlora's service.

    Parameters
    ----------
    url : str
        Where `scimlora serve` listens.
    key : str
        Its API key, if it wants one.
    timeout : float
        Seconds to wait for an answer; ten times as long for a file.
    """

    genes = None  # the service does not list them

    def __init__(self, url, key="", timeout=60.0):
        self._url, self._timeout, self.where = url.rstrip("/"), timeout, f"at {url}"
        # ngrok's free plan shows a page of its own to whoever does not send the second header.
        self._headers = {"ngrok-skip-browser-warning": "1"} | ({"X-API-Key": key} if key else {})

    def model(self):
        "Return the manifest, with the calibration."
        model = self._json("GET", "/model")
        if not isinstance(model, dict) or "labels" not in model: raise self._stranger()
        return model

    def ask(self, cell, units):
        "Return what cell type a dictionary of gene → value is."
        return self._json("POST", "/predict", json={"expression": cell, "units": units})

    def annotate(self, name, data, units):
        "Annotate a file and return an `Annotated`, without an h5ad."
        answer = self._json("POST", "/annotate", timeout=10 * self._timeout, params={"format": "json", "units": units},
                            files={"file": (name, data)})
        return Annotated(pd.DataFrame(answer["cells"]), answer["notes"])

    def _json(self, method, route, timeout=None, **kw):
        wait = timeout or self._timeout
        try: r = requests.request(method, self._url + route, headers=self._headers, timeout=(min(10, wait), wait), **kw)
        except requests.Timeout:
            raise Problem(f"The service {self.where} did not answer within {wait:,.0f} seconds. It may be busy or waking up: "
                          "wait a minute and try again.") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema):
            raise Problem(f"API_URL is no web address: “{self._url}”. It should look like https://example.org.") from None
        except requests.RequestException: raise Problem(self._cut_off("files" in kw)) from None
        if r.ok:
            try: return r.json()
            except ValueError: raise self._stranger() from None
        raise Problem(self._refusal(r))

    def _cut_off(self, sending_file):
        # A service that refuses a large body closes the connection while it is still being sent, and its answer is lost.
        if sending_file and self._alive(): return _TOO_LARGE
        return (f"The service {self.where} cannot be reached. It may be switched off or still starting: try again in a minute, "
                "or ask whoever runs it.")

    def _alive(self):
        try: return requests.get(self._url + "/healthz", headers=self._headers, timeout=5).ok
        except requests.RequestException: return False

    def _stranger(self):
        return Problem(f"What answers {self.where} is not scimlora's service. Check the address in API_URL.")

    def _refusal(self, r):
        if r.status_code in (401, 403):
            return f"The service {self.where} does not accept the key. Check API_KEY, or ask whoever runs the service for a new one."
        if r.status_code == 404: return str(self._stranger())
        if r.status_code == 413: return _TOO_LARGE
        if r.status_code == 429: return "The service was asked too often. Wait a minute and try again."
        if r.status_code == 503: return "The service is busy or still starting. Wait a minute and try again."
        if r.status_code < 500: return _sentence(_detail(r))
        return f"The service {self.where} failed (error {r.status_code}). Try again; if it stays so, tell whoever runs it."


def _detail(r):
    "What the service says is wrong, from `{'detail': text or list of texts}`."
    try: detail = r.json()["detail"]
    except (ValueError, KeyError, TypeError): detail = f"error {r.status_code}"
    if isinstance(detail, list): detail = "; ".join(map(str, detail))
    return str(detail).removeprefix("cell 0: ")


def _sentence(text):
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."
