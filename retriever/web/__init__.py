"""The local server: a page to look at pictures, a JSON API, and a socket for the command line.

Nothing here searches; every answer is one of `retriever.library.Library`.

    app.py        what is asked over HTTP, and what comes back
    schemas.py    the same as types, which the OpenAPI description is made from
    guard.py      who may ask, how much and how often; headers that keep a page to itself
    service.py    libraries, threads, uploads, thumbnails, maps
    thumbnails.py small pictures, kept on disk within a bound
    run.py        listens until it is told to end
    projection.py every picture as a point on a map, by what it shows
    local.py      answers `retriever search`, which finds the server by `retriever.running`
    static/       the page: HTML, CSS and JavaScript as they are
"""
