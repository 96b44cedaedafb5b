"""The page Provider: how Quiltt responds to calls, and how long balances take."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.page_rendering import render
from dashboard.provider_reading import ProviderReader
from dashboard.provider_view import PERCENTILES, SPANS


def show_provider(request: Request) -> Response:
    """Show the figures of an hour, a day and a week, and the details of one of them."""
    reader: ProviderReader = request.app.state.provider_reader
    span = request.query_params.get("span", "hour")
    problem = None if span in SPANS else f"span must be one of {', '.join(SPANS)}; this is the hour"
    span = span if problem is None else "hour"
    views = reader.views()
    return render(
        request,
        "provider.html",
        status_code=400 if problem else 200,
        problem=problem,
        span=span,
        spans=SPANS,
        view=views.get(span),
        views=views,
        missing=[name for name in SPANS if name not in views],
        percentiles=PERCENTILES,
    )


ROUTES = [Route("/provider", show_provider)]
