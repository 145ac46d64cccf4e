"Kiwi-Edit's nodes for ComfyUI; link this folder into custom_nodes, with kiwi-edit installed in ComfyUI's Python."

from kiwi_edit.apps.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
