"""The Space's page as HTML fragments: facts in, escaped text out, with links that open latents."""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from sparc_hf.codes.concept_search import LatentMatch
from sparc_hf.codes.concepts import Evidence
from sparc_hf.codes.search import Match
from sparc_hf.evaluation.plots import cofires_against_energy, entropy_histogram, svg_text
from sparc_hf.maps.explanation import Explanation, unread_remarks
from sparc_hf.maps.plots import ExplainedTarget
from sparc_hf.maps.scored_words import WordScore
from sparc_hf.space.data import LatentFacts, SpaceData
from sparc_hf.space.index import encoded_image
from sparc_hf.space.seen_maps import SeenImage

LATENTS_PER_PAGE = 20
HEAT_COLOURS = ((255, 225, 60), (255, 130, 0), (255, 15, 40))


def latent_link(data: SpaceData, latent: int, note: str = "", kind: str = "chip") -> str:
    """Return a link that opens a latent, with a remark such as its share."""
    remark = f" <small>{escape(note)}</small>" if note else ""
    return f'<a class="{kind}" href="?latent={latent}" data-latent="{latent}">{escape(data.title(latent))}{remark}</a>'


def latents_table(data: SpaceData, matches: Sequence[LatentMatch], page: int = 0) -> str:
    """Return one page of found latents, each with why it was found, and links to the pages before and after."""
    pages = max(1, -(-len(matches) // LATENTS_PER_PAGE))
    page = min(max(page, 0), pages - 1)
    shown = matches[page * LATENTS_PER_PAGE : (page + 1) * LATENTS_PER_PAGE]
    if not shown:
        return '<p class="empty">No latent has such a name, label or word. Try fewer letters, or a number.</p>'
    columns = data.index.statistics
    lines = "".join(
        f"<tr><th scope=row>{latent_link(data, match.latent, kind='plain')}{_reason(match)}</th>"
        + "".join(
            f"<td>{_number(columns[name][match.latent], form)}</td>"
            for name, form in (
                ("alignment/single", ".2f"),
                ("alignment/joint", ".2f"),
                ("fires/single", ".1%"),
                ("energy/single", ".3f"),
                ("entropy/single", ".2f"),
            )
        )
        + "</tr>"
        for match in shown
    )
    head = "".join(
        f'<th scope=col title="{escape(words)}">{name}</th>'
        for name, words in (
            ("latent", "number and name"),
            ("align. single", "label Jaccard between streams, each stream encoded alone"),
            ("align. joint", "label Jaccard between streams, encoded together"),
            ("fires", "share of the samples it fires on, mean over streams"),
            ("energy", "mean value times the norm of the atom, summed over streams"),
            ("entropy", "how evenly its firings are spread over streams, from 0 to 1"),
        )
    )
    return (
        f"<table class=latents><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        f"<nav class=pages>{_page_button('previous', page - 1, page > 0)}"
        f"<span>{len(matches):,} latents, page {page + 1} of {pages}</span>"
        f"{_page_button('next', page + 1, page + 1 < pages)}</nav>"
    )


def latent_page(data: SpaceData, facts: LatentFacts) -> str:
    """Return what is known of a latent, but for its samples."""
    fires = "" if any(facts.samples.values()) else "<p>It fires on none of the indexed samples.</p>"
    shares = "".join(
        f"<div><dt>fires in <code>{escape(stream)}</code></dt>"
        f"<dd>{facts.figures[f'frequency/{stream}/single']:.1%}</dd></div>"
        for stream in data.streams
    )
    figures = "".join(
        f"<div><dt>{words}</dt><dd>{_number(facts.figures[name], form)}</dd></div>"
        for words, name, form in (
            ("alignment, single-stream", "alignment/single", ".3f"),
            ("alignment, joint", "alignment/joint", ".3f"),
            ("energy", "energy/single", ".4f"),
            ("firing entropy", "entropy/single", ".3f"),
            ("co-firing", "cofire_jaccard/single", ".3f"),
        )
    )
    near = "".join(
        f"<p><code>{escape(stream)}</code> "
        + " ".join(latent_link(data, other, f"{cosine:.2f}") for other, cosine in nearest)
        + "</p>"
        for stream, nearest in facts.neighbours.items()
    )
    return (
        f'<div id="latent-page" tabindex="-1"><h2>{escape(data.title(facts.latent))}</h2>{fires}'
        f"<dl class=figures>{figures}{shares}</dl>"
        f"<div class=columns>{_evidence('Labels', facts.labels)}{_evidence('Words of captions', facts.words)}</div>"
        f"<h3>Nearest atoms <small>cosine</small></h3>{near}</div>"
    )


def latent_with_samples(data: SpaceData, facts: LatentFacts, samples: str, *, with_maps: bool) -> str:
    """Return the page of a latent and below it its samples, marked with its number and whether these have maps."""
    maps = "yes" if with_maps else "no"
    marks = f'data-shown="{facts.latent}" data-maps="{maps}"'
    return f'<div {marks}><div id="facts">{latent_page(data, facts)}</div><div id="samples">{samples}</div></div>'


def latent_samples(
    data: SpaceData, facts: LatentFacts, maps: Mapping[str, Sequence[SeenImage | None]] | None = None
) -> str:
    """Return the top samples of a latent in every stream, side by side.

    Args:
        data: for images and captions.
        facts: of the latent.
        maps: image stream -> what its encoder saw of each sample, with the latent's map; without it, plain images.
    """
    columns = []
    for stream, samples in facts.samples.items():
        seen = (maps or {}).get(stream) or [None] * len(samples)
        figures = "".join(
            _sample(data, stream, row, f"{value:.2f}", view) for (row, value), view in zip(samples, seen, strict=True)
        )
        kind = "texts" if data.modality(stream) == "text" else "images"
        body = figures or "<p class=empty>It does not fire here.</p>"
        title = f"<h4><code>{escape(stream)}</code> <small>{escape(data.modality(stream))}</small></h4>"
        columns.append(f'<section class="{kind}">{title}<div class=samples>{body}</div></section>')
    return f"<h3>Top samples <small>each stream encoded alone</small></h3><div class=streams>{''.join(columns)}</div>"


def sample_strip(data: SpaceData, rows: Iterable[int]) -> str:
    """Return samples to pick from, as buttons."""
    buttons = []
    for row in rows:
        caption = data.caption(row) or data.sample_name(row)
        inside = _image_tag(data, row, "") or f"<span>{escape(caption[:60])}</span>"
        words = escape(f"sample {row}: {caption[:200]}", quote=True)
        buttons.append(
            f'<button type="button" data-row="{row}" title="{words}" aria-label="{words}">{inside}</button>'
        )
    return f"<div class=strip>{''.join(buttons)}</div>"


def retrieval_page(data: SpaceData, source: str, target: str, query: Image.Image | str | int) -> str:
    """Return a query with its strongest latents, and what it finds; see `SpaceData.retrieve`."""
    code = data.query_code(source, query)
    matches = data.retrieve(source, target, query, code=code)
    picture = data.image(query) if isinstance(query, int) else query if isinstance(query, Image.Image) else None
    caption = (data.caption(query) or "") if isinstance(query, int) else query if isinstance(query, str) else ""
    remarks = unread_remarks(source, data.encoders[source], query) if isinstance(query, str) else []
    card = query_card(data, picture, caption, data.strongest(code, 6))
    return _remarks(remarks) + matches_page(data, target, matches, card)


def matches_page(data: SpaceData, target: str, matches: Sequence[Match], query: str = "") -> str:
    """Return found samples with what they share with the query.

    Args:
        data: for images and captions.
        target: the stream that was searched.
        matches: what was found.
        query: HTML of the query.
    """
    if not matches:
        return f"{query}<p class=empty>No indexed sample shares an active latent with this.</p>"
    cards = []
    for rank, match in enumerate(matches, start=1):
        shared = " ".join(latent_link(data, latent, f"{share:.0%}") for latent, share in match.shared[:5])
        caption = data.caption(match.row)
        text = (
            f"<p class=caption>{escape(caption)}</p>" if caption else f"<p>{escape(data.sample_name(match.row))}</p>"
        )
        picture = _image_tag(data, match.row, caption or "")
        body = text + picture if data.modality(target) == "text" else picture + text
        cards.append(
            f"<article><header>{rank} <b>{match.similarity:.3f}</b></header>{body}<p class=why>{shared}</p></article>"
        )
    return f"{query}<div class=matches>{''.join(cards)}</div>"


def query_card(data: SpaceData, picture: Image.Image | None, caption: str, active: Sequence[tuple[int, float]]) -> str:
    """Return a query: its image or caption, and its strongest latents."""
    shown = f'<img alt="the query" src="{_data_uri(picture)}">' if picture is not None else ""
    text = f"<p class=caption>{escape(caption)}</p>" if caption else ""
    chips = " ".join(latent_link(data, latent, f"{value:.2f}") for latent, value in active)
    return f"<div class=query>{shown}<div>{text}<p class=why>{chips}</p></div></div>"


def explanation_page(data: SpaceData, explanation: Explanation) -> str:
    """Return maps in every image stream, the baseline, the caption's words, and the strongest latents as bars."""
    targets = explanation.targets
    latent = next((latent for target in targets for latent in target.latents), None)
    panels = [panel for target in targets for panel in _target_panels(explanation, target)]
    panels += [
        _panel(f"{stream}: similarity of embeddings (baseline)", SeenImage(explanation.views[stream], grid))
        for stream, grid in explanation.baselines.items()
    ]
    words = "".join(_target_words(explanation.caption, target) for target in targets)
    bars = "".join(
        f"<section><h4><code>{escape(stream)}</code></h4>"
        f"{latent_bars(data, data.strongest(code.numpy()), latent)}</section>"
        for stream, code in explanation.codes.items()
    )
    title = "Where image and caption are alike" if latent is None else f"Where {data.title(latent)} is"
    opened = (
        f' <a class="chip" href="?latent={latent}" data-open="{latent}">open in the explorer</a>'
        if latent is not None
        else ""
    )
    heading = f"<h3>{escape(title)}{opened}</h3>" if panels or words else ""
    return (
        f"{_remarks(explanation.remarks)}{heading}<div class=panels>{''.join(panels)}</div>"
        f"<div class=streams>{words}</div>"
        "<h3>Strongest latents <small>of each stream alone; choose one to see its map</small></h3>"
        f"<div class=streams>{bars}</div>"
    )


def latent_bars(data: SpaceData, active: Sequence[tuple[int, float]], shown: int | None = None) -> str:
    """Return a code's largest values as bars, each a link to its latent."""
    if not active:
        return "<p class=empty>No latent is active.</p>"
    largest = active[0][1]
    lines = "".join(
        f'<li{" class=chosen" if latent == shown else ""}><a href="?latent={latent}" data-latent="{latent}">'
        f"<span>{escape(data.title(latent))}</span>"
        f'<i style="width:{100 * value / largest:.1f}%"></i><b>{value:.2f}</b></a></li>'
        for latent, value in active
    )
    return f"<ul class=bars>{lines}</ul>"


def marked_words(caption: str, scores: Sequence[WordScore]) -> str:
    """Return a caption with its words the more coloured the higher they score."""
    largest = max((word.score for word in scores), default=0.0) or 1.0
    parts, done = [], 0
    for word in scores:
        parts.append(escape(caption[done : word.start]))
        letters = escape(caption[word.start : word.end])
        parts.append(f'<mark style="--share:{word.score / largest:.3f}" title="{word.score:.3g}">{letters}</mark>')
        done = word.end
    return "".join([*parts, escape(caption[done:])])


def compare_page(data: SpaceData, encoding: str) -> str:
    """Return which latents live in which streams: patterns, entropy, co-firing, and how well streams rebuild others.

    Args:
        data: with the index.
        encoding: "joint" or "single".
    """
    columns, results = data.index.statistics, data.index.results[encoding]
    firing = columns[f"fires/{encoding}"] > 0
    links = [f"?latent={latent}" for latent in range(data.num_latents)]
    scatter = cofires_against_energy(
        {"": (columns[f"energy/{encoding}"], columns[f"cofires/{encoding}"])}, links=links
    )
    histogram = entropy_histogram({"": columns[f"entropy/{encoding}"][firing]})
    left_out = data.features.rows_left_out
    measured = f"<p>On {len(data.features)} samples that have every stream; {left_out} more lack one.</p>"
    return (
        f"{measured if left_out else ''}<div class=plots>"
        f"<section><h3>Where latents live</h3>{_patterns(results['liveness'], data.num_latents)}</section>"
        "<section><h3>Firing entropy</h3><p>0: fires in one stream only. 1: in all alike.</p>"
        f"{svg_text(histogram)}</section>"
        "<section><h3>Co-firing against energy</h3><p>Each point is a latent; choose one to open it.</p>"
        f"{_linked(svg_text(scatter), data)}</section>"
        f"<section><h3>Reconstruction error</h3>{_matrix(results['reconstruction']['nmse'])}</section>"
        f"<section><h3>In most streams, by energy</h3>{_shared_latents(data, encoding)}</section>"
        "</div>"
    )


def heat_image(heat: np.ndarray) -> Image.Image:
    """Return a map [rows, columns] as a small transparent image: yellow where it begins, red at its largest."""
    largest = float(np.max(heat, initial=0.0))
    share = np.clip(heat / largest, 0, 1) if largest > 0 else np.zeros_like(heat)
    colours = np.array(HEAT_COLOURS, float)
    place = share * (len(colours) - 1)
    below = np.minimum(place.astype(int), len(colours) - 2)
    share_above = (place - below)[..., None]
    mixed = colours[below] * (1 - share_above) + colours[below + 1] * share_above
    return Image.fromarray(np.concatenate([mixed, share[..., None] * 255], axis=-1).round().astype(np.uint8), "RGBA")


def _reason(match: LatentMatch) -> str:
    return f"<small class=why>{escape(match.reason)}</small>" if match.reason else ""


def _remarks(remarks: Sequence[str]) -> str:
    return "".join(f"<p class=remark>{escape(remark)}</p>" for remark in remarks)


def _target_panels(explanation: Explanation, target: ExplainedTarget) -> Iterator[str]:
    """Yield what each image stream's encoder sees, with the target's map where there is one."""
    for stream, view in explanation.views.items():
        title = stream if len(explanation.targets) == 1 else f"{stream}: {target.title}"
        yield _panel(title, SeenImage(view, target.grids.get(stream)), _activity(target, stream))


def _target_words(caption: str, target: ExplainedTarget) -> str:
    """Return the caption as each text stream has it of a target, unmarked where the target is not active."""
    return "".join(
        f"<section><h4><code>{escape(stream)}</code> <small>{_activity(target, stream) or 'words'}</small></h4>"
        f"<p class=caption>{marked_words(caption, [] if stream in target.inactive else words)}</p></section>"
        for stream, words in target.words.items()
    )


def _activity(target: ExplainedTarget, stream: str) -> str:
    return "not active" if stream in target.inactive else ""


def _panel(title: str, view: SeenImage, note: str = "") -> str:
    note = "nowhere" if view.heat is not None and not view.heat.any() else note
    small = f" <small>{note}</small>" if note else ""
    return f"<figure>{_overlaid(view, title)}<figcaption>{escape(title)}{small}</figcaption></figure>"


def _overlaid(view: SeenImage, words: str) -> str:
    size = 'class="overlaid"'
    under = f'<img alt="{escape(words, quote=True)}" src="{_data_uri(view.image)}">'
    if view.heat is None:
        return f"<div {size}>{under}</div>"
    # The browser stretches the few cells of the map smoothly over the image.
    return f'<div {size}>{under}<img class="heat" alt="" src="{_data_uri(heat_image(view.heat), exact=True)}"></div>'


def _sample(data: SpaceData, stream: str, row: int, value: str, view: SeenImage | None) -> str:
    caption = data.caption(row)
    words = caption or data.sample_name(row)
    if data.modality(stream) == "text" and caption:
        return f"<figure><p class=caption>{escape(caption)}</p><figcaption>{value}</figcaption></figure>"
    picture = _overlaid(view, words) if view is not None else _image_tag(data, row, words)
    inside = picture or f"<p class=caption>{escape(words)}</p>"
    return f'<figure title="{escape(words, quote=True)}">{inside}<figcaption>{value}</figcaption></figure>'


def _image_tag(data: SpaceData, row: int, words: str) -> str:
    content = data.index.thumbnail(row)
    if content is None:
        return ""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img loading="lazy" alt="{escape(words, quote=True)}" src="{uri}">'


def _data_uri(image: Image.Image, exact: bool = False) -> str:
    exact = exact or max(image.size) <= 128
    content = encoded_image(image, exact=exact)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(content).decode()}"


def _evidence(title: str, evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return ""
    lines = "".join(
        f"<tr><th scope=row>{escape(item.name)}</th><td>{item.lift:.1f}</td><td>{item.count}</td>"
        f"<td>{item.z:.1f}</td></tr>"
        for item in evidence
    )
    head = (
        f"<th scope=col>{title}</th>"
        '<th scope=col title="how many times more often among its samples than among all">lift</th>'
        '<th scope=col title="its samples that have it">count</th>'
        '<th scope=col title="log odds of the difference, in standard deviations">z</th>'
    )
    return f"<table class=evidence><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _patterns(liveness: Mapping[str, Any], latents: int) -> str:
    counts = {"all streams": liveness["alive_in_all"], **liveness["patterns"], "none (dead)": liveness["dead"]}
    lines = "".join(
        f'<li><span class="row"><span>{escape(pattern)}</span><i style="width:{100 * count / latents:.1f}%"></i>'
        f"<b>{count:,}</b></span></li>"
        for pattern, count in counts.items()
    )
    return f"<ul class=bars>{lines}</ul>"


def _matrix(errors: Mapping[str, Mapping[str, float | None]]) -> str:
    streams = list(errors)
    head = "".join(f"<th scope=col><code>{escape(stream)}</code></th>" for stream in streams)
    lines = "".join(
        f"<tr><th scope=row><code>{escape(target)}</code></th>"
        + "".join(_shaded(errors[target][source]) for source in streams)
        + "</tr>"
        for target in streams
    )
    return (
        "<p>Normalised squared error of a target (row) decoded from a source's codes (column): 0 is perfect, 1 no "
        "better than nothing.</p>"
        f"<table class=matrix><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _shaded(error: float | None) -> str:
    if error is None:
        return "<td>undefined</td>"
    return f'<td style="--share:{min(max(1 - error, 0), 1):.3f}">{error:.3f}</td>'


def _shared_latents(data: SpaceData, encoding: str, count: int = 16) -> str:
    columns = data.index.statistics
    order = np.lexsort((-columns[f"energy/{encoding}"], -columns[f"live/{encoding}"]))[:count]
    chips = [latent_link(data, int(latent), f"{int(columns[f'live/{encoding}'][latent])} streams") for latent in order]
    return f"<p>{' '.join(chips)}</p>"


def _linked(svg: str, data: SpaceData) -> str:
    """Let the points of a plot open their latents; for the keyboard there is the explorer's list."""

    def link(point: re.Match[str]) -> str:
        latent = int(point.group(1))
        title = escape(data.title(latent), quote=True)
        return f'href="?latent={latent}" data-latent="{latent}" tabindex="-1" aria-label="{title}"'

    return re.sub(r'xlink:href="\?latent=(\d+)"(?: target="_blank")?', link, svg)


def _page_button(words: str, page: int, enabled: bool) -> str:
    return f'<button type="button" data-page="{page}"{"" if enabled else " disabled"}>{words}</button>'


def _number(value: float, form: str) -> str:
    return "-" if not np.isfinite(value) else format(value, form)
