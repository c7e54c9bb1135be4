//! The shipped C header agrees with the Rust types: text, layouts and constants.

use fermata_plugin_api::{abi, header};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

fn include_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/include"))
}

#[test]
fn the_shipped_header_is_the_rendered_one() {
    let path = include_dir().join("fermata_plugin.h");
    let rendered = header::render();
    if std::env::var_os("FERMATA_BLESS").is_some() {
        std::fs::write(&path, &rendered).expect("the header can be written");
    }
    let shipped = std::fs::read_to_string(&path).expect("the header is there");
    assert!(
        shipped == rendered,
        "{} is out of date: run this test with FERMATA_BLESS=1 and review the difference",
        path.display()
    );
}

#[test]
fn a_c_compiler_computes_the_layouts_and_constants_of_the_rust_types() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut expected = String::new();
    let mut program =
        String::from("#include \"fermata_plugin.h\"\n#include <stdio.h>\n#include <stdalign.h>\nint main(void) {\n");
    for structure in abi::STRUCTS {
        let name = structure.name;
        writeln!(expected, "{name} {} {}", structure.size, structure.align).unwrap();
        writeln!(program, "printf(\"{name} %zu %zu\\n\", sizeof({name}), alignof({name}));").unwrap();
        for field in structure.fields {
            let field_name = field.name;
            writeln!(expected, "{name}.{field_name} {}", field.offset).unwrap();
            writeln!(program, "printf(\"{name}.{field_name} %zu\\n\", offsetof({name}, {field_name}));").unwrap();
        }
    }
    let numbers = [
        ("FERMATA_PLUGIN_ABI", i64::from(abi::VERSION)),
        ("FERMATA_MAX_REPLY", abi::MAX_REPLY_BYTES as i64),
        ("FERMATA_OK", i64::from(abi::STATUS_OK)),
        ("FERMATA_ERROR", i64::from(abi::STATUS_ERROR)),
        ("FERMATA_UNSUPPORTED", i64::from(abi::STATUS_UNSUPPORTED)),
        ("FERMATA_CANCELLED", i64::from(abi::STATUS_CANCELLED)),
        ("FERMATA_PANIC", i64::from(abi::STATUS_PANIC)),
        ("FERMATA_LOG_ERROR", i64::from(abi::LEVEL_ERROR)),
        ("FERMATA_LOG_DEBUG", i64::from(abi::LEVEL_DEBUG)),
    ];
    for (name, value) in numbers {
        writeln!(expected, "{name} {value}").unwrap();
        writeln!(program, "printf(\"{name} %lld\\n\", (long long)({name}));").unwrap();
    }
    program.push_str("return 0;\n}\n");

    let source = dir.path().join("layout.c");
    let binary = dir.path().join("layout");
    std::fs::write(&source, program).unwrap();
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(include_dir())
        .arg("-o")
        .args([&binary, &source])
        .output()
        .expect("cc is installed");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&binary).output().expect("the program runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

/// The offsets of version 1 on 64-bit platforms; new fields are only appended.
#[test]
#[cfg(target_pointer_width = "64")]
fn version_1_keeps_its_offsets() {
    let offsets: Vec<Vec<(&str, usize)>> =
        abi::STRUCTS.iter().map(|structure| structure.fields.iter().map(|f| (f.name, f.offset)).collect()).collect();
    assert_eq!(offsets[0][..2], [("ptr", 0), ("len", 8)]);
    assert_eq!(offsets[1][..4], [("size", 0), ("context", 8), ("log", 16), ("cancelled", 24)]);
    assert_eq!(
        offsets[2][..7],
        [("size", 0), ("describe", 8), ("create", 16), ("call", 24), ("cancel", 32), ("destroy", 40), ("free", 48)]
    );
}
