"""The shipped Prometheus and Grafana files against the real server and a real Prometheus."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.mixed_load import asks, send
from support.prometheus import Prometheus, promtool, running_prometheus
from support.serving import Server

FILES = Path(__file__).parents[3] / "server/observability"
GRAFANA = FILES / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards/sluice.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((FILES / "alerts.yml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
SERIES = re.compile(r"(?<![\w:])(?:sluice_\w+|vllm:\w+)")
LIMIT_SECONDS = 120


def queries() -> Iterator[tuple[str, str]]:
    """Title and expression of every panel's every query."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def substituted(expr: str) -> str:
    """A query as Grafana sends it with every job and server chosen, at a scrape a second."""
    whole = expr.replace("$__rate_interval", "10s")
    for variable in ("$job", "$instance"):
        whole = whole.replace(variable, ".*")
    assert "$" not in whole.replace("$1", "")
    return whole


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has seen a mixed load, and when."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="module")
def watched(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Under the shipped configuration, but for the target and the pace."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FILES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FILES / name) for name in config["rule_files"]]
    address = server.url.removeprefix("http://")
    config["scrape_configs"][0]["static_configs"] = [{"targets": [address]}]
    shipped = folder / "prometheus.yml"
    shipped.write_text(yaml.safe_dump(config))
    with running_prometheus(shipped, folder) as prometheus:
        start = time.time()
        awaited(lambda: prometheus.get("query", query="up == 1")["result"])
        send(server, asks(rounds=3))
        ended = time.time()
        awaited(lambda: last_scrape(prometheus) > ended)
        yield Watched(prometheus, start, time.time())


def last_scrape(prometheus: Prometheus) -> float:
    result = prometheus.get("query", query="timestamp(up)")["result"]
    return float(result[0]["value"][1]) if result else 0.0


def awaited(ready: Any) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(("kind", "name"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_promtool_takes_the_files(kind: str, name: str) -> None:
    check = promtool("check", kind, FILES / name)
    assert check.returncode == 0, check.stdout + check.stderr


def test_alerts_fire_when_they_should() -> None:
    cases = Path(__file__).parent / "alerts.test.yml"
    check = promtool("test", "rules", cases)
    assert check.returncode == 0, check.stdout + check.stderr
    tested = yaml.safe_load(cases.read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tested
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in RULES if "alert" in rule}


def test_alerts_say_what_is_wrong() -> None:
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert rule["annotations"].keys() == {"summary", "description"}
            assert rule["for"]


def test_every_series_that_is_named_exists(server: Server, watched: Watched) -> None:
    there = {name for name, _ in server.samples()}
    named = {
        series
        for expr in [*(expr for _, expr in queries()), *(rule["expr"] for rule in RULES)]
        for series in SERIES.findall(expr)
    }
    assert len(named) > 15
    assert named <= there


@pytest.mark.parametrize("expr", [pytest.param(expr, id=title) for title, expr in queries()])
def test_every_panel_has_data(watched: Watched, expr: str) -> None:
    found = watched.prometheus.range(substituted(expr), watched.start, watched.end)
    assert found
    numbers = [float(value) for series in found for _, value in series["values"]]
    assert any(math.isfinite(number) for number in numbers)


def test_the_heatmaps_have_a_row_for_each_layer(watched: Watched) -> None:
    maps = [panel for panel in PANELS if panel["type"] == "heatmap"]
    assert len(maps) == 2
    for panel in maps:
        expr = substituted(panel["targets"][0]["expr"])
        found = watched.prometheus.range(expr, watched.start, watched.end)
        assert [series["metric"]["layer"] for series in found] == [f"0{n}" for n in range(8)]


def test_the_rules_run_and_a_healthy_server_is_up(watched: Watched) -> None:
    def rules() -> list[Any]:
        groups = watched.prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    awaited(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert {rule["health"] for rule in rules()} == {"ok"}
    states = {rule["name"]: rule["state"] for rule in rules() if "state" in rule}
    assert states.keys() == {rule["alert"] for rule in RULES if "alert" in rule}
    for name in ("SluiceDown", "SluiceEngineStalled", "SluiceExpertCollapse"):
        assert states[name] == "inactive"
    (target,) = watched.prometheus.get("targets", state="active")["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "sluice")


def test_the_variables_find_the_job_and_the_server(server: Server, watched: Watched) -> None:
    variables = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    address = server.url.removeprefix("http://")
    for variable, values in zip(variables, (["sluice"], [address]), strict=True):
        query = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert query is not None
        path = f"label/{query[2]}/values"
        assert watched.prometheus.get(path, **{"match[]": substituted(query[1])}) == values
    assert [variable["name"] for variable in variables] == ["job", "instance"]


def test_every_query_goes_by_the_chosen_job() -> None:
    for title, expr in queries():
        selectors = re.findall(r"\{([^}]*)\}", expr)
        assert selectors, title
        for selector in selectors:
            assert 'job=~"$job", instance=~"$instance"' in selector, title


def test_the_top_row_is_of_single_numbers() -> None:
    heading, *rest = DASHBOARD["panels"]
    assert (heading["type"], heading["gridPos"]["y"]) == ("row", 0)
    top = [panel for panel in rest if panel["gridPos"]["y"] == 1]
    assert {panel["type"] for panel in top} == {"stat"}
    assert sum(panel["gridPos"]["w"] for panel in top) == 24
    assert not [panel for panel in rest if panel["type"] == "stat" and panel not in top]


def test_the_dashboard_bakes_no_data_source_in() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert "current" not in variables["datasource"]
    sources = [part["datasource"] for panel in PANELS for part in (panel, *panel["targets"])]
    sources += [variables[name]["datasource"] for name in ("job", "instance")]
    sources += [own["datasource"] for own in DASHBOARD["annotations"]["list"]]
    assert all(own == {"type": "prometheus", "uid": "${datasource}"} for own in sources)


def test_panels_have_names_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]


def test_grafana_is_provisioned_with_what_is_there() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    config = yaml.safe_load((FILES / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/sluice.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "$SLUICE_DASHBOARDS"
