"""`page_head`: what the HTML pages of a command begin with."""


def page_head(command: str) -> str:
    """The first lines of a page, by which those of a command (`mmfn plan`) are told from those of others."""
    start = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    return f'{start}<meta name="generator" content="{command}">'
