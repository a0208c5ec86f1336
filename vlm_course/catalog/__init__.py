"""The real models that the course names, as data with sources.

`find` and `select` give models, `catalog_table` a table for a page, `building.build` the module on the meta device.
"""

from vlm_course.catalog.records import FIELDS, Fact, Model, Source, all_models, find, select
from vlm_course.catalog.table import CatalogTable, catalog_table

__all__ = ["FIELDS", "CatalogTable", "Fact", "Model", "Source", "all_models", "catalog_table", "find", "select"]
