//! Renders the C header from the descriptions in [`crate::abi`].
//!
//! `include/fermata_plugin.h` is the output of [`render`]; `tests/header.rs` compares the two, and rewrites the file when
//! `FERMATA_BLESS=1` is set.

use crate::abi::{self, CConstant, CStruct};

/// The maximum width of a declaration; longer ones are wrapped.
const WIDTH: usize = 96;

/// Returns the text of the header.
pub fn render() -> String {
    let mut out = String::new();
    out.push_str(
        "/* fermata_plugin.h: the C ABI of Fermata plugins, version 1.\n\
         \x20*\n\
         \x20* Generated from plugin-api/src/abi.rs; do not edit.\n\
         \x20* Layouts are frozen: a table begins with its size and only grows at the end.\n\
         \x20*/\n\
         #ifndef FERMATA_PLUGIN_H\n#define FERMATA_PLUGIN_H\n\n\
         #include <stddef.h>\n#include <stdint.h>\n\n\
         #ifdef __cplusplus\nextern \"C\" {\n#endif\n\n",
    );
    out.push_str(&format!(
        "#define FERMATA_PLUGIN_ABI {}\n\n/* The maximum size of a reply, in bytes. */\n#define FERMATA_MAX_REPLY {}\n\n",
        abi::VERSION,
        abi::MAX_REPLY_BYTES
    ));
    out.push_str("/* Return values of the functions of a plugin. */\n");
    constants(&mut out, abi::STATUSES);
    out.push_str("\n/* Levels of log lines. */\n");
    constants(&mut out, abi::LEVELS);
    for description in abi::STRUCTS {
        out.push('\n');
        structure(&mut out, description);
    }
    out.push_str(&format!(
        "\n/* The symbol that a plugin exports. */\nconst FermataPluginV1 *{}(void);\n\n\
         #ifdef __cplusplus\n}}\n#endif\n\n#endif /* FERMATA_PLUGIN_H */\n",
        abi::SYMBOL
    ));
    out
}

fn constants(out: &mut String, constants: &[CConstant]) {
    for constant in constants {
        out.push_str(&format!("#define {:<20} {} /*{} */\n", constant.name, constant.value, constant.docs));
    }
}

fn structure(out: &mut String, description: &CStruct) {
    comment(out, "", description.docs);
    out.push_str(&format!("typedef struct {} {{\n", description.name));
    for field in description.fields {
        comment(out, "    ", field.docs);
        out.push_str(&wrapped(field.declaration));
    }
    out.push_str(&format!("}} {};\n", description.name));
}

fn comment(out: &mut String, indent: &str, lines: &[&str]) {
    for (number, line) in lines.iter().enumerate() {
        let start = if number == 0 { "/*" } else { " *" };
        let end = if number + 1 == lines.len() { " */" } else { "" };
        out.push_str(format!("{indent}{start}{line}{end}").trim_end());
        out.push('\n');
    }
}

/// Wraps a declaration before the argument that would exceed [`WIDTH`].
fn wrapped(declaration: &str) -> String {
    let mut lines = vec![String::from("    ")];
    for (number, part) in declaration.split(", ").enumerate() {
        let last = lines.last().map_or(0, String::len);
        if number > 0 && last + 2 + part.len() > WIDTH {
            if let Some(line) = lines.last_mut() {
                line.push(',');
            }
            lines.push(format!("        {part}"));
        } else if let Some(line) = lines.last_mut() {
            if number > 0 {
                line.push_str(", ");
            }
            line.push_str(part);
        }
    }
    lines.join("\n") + ";\n"
}
