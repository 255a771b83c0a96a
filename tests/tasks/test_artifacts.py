from tasks.artifacts import _model_link


def test_a_version_is_linked_where_the_store_has_pages():
    page = "http://host:5000/#/experiments/1/runs/abc"

    assert _model_link("models:/demo-veil/3", page) == (
        "[models:/demo-veil/3](http://host:5000/#/models/demo-veil/versions/3)"
    )
    assert _model_link("models:/demo-veil/3", None) == "`models:/demo-veil/3`"
