//! `[project.config]`: the project's settings under the protocol's own names, whatever they are.
//!
//! A setting that the protocol gains is known here at once. A key that ends in `_bytes` takes a
//! size as text too, one that ends in `_ms` a duration.

use fermata_protocol::project::ProjectConfig;
use serde_json::{Map, Number, Value};

use super::problems::Problem;
use super::section::{Problems, nearest, path};
use super::tree::{Kind, Member, Node};
use crate::units::{millis, parse_bytes, parse_duration};

/// Where the settings stand.
const PATH: &str = "project.config";

/// Reads the settings; those that are left out have their defaults.
pub fn read(member: &Member, problems: &Problems) -> Option<ProjectConfig> {
    let Kind::Table(table) = &member.node.kind else {
        let message = format!("'{PATH}' must be a table, not {}", member.node.kind.name());
        problems.add(Problem::new(member.node.span.clone(), PATH, message));
        return None;
    };
    let mut good = true;
    // Each by itself, so that one that is wrong does not hide the next.
    for (name, member) in table {
        let check = |value: Value| config([(name.clone(), value)].into_iter().collect()).map(drop);
        if let Err(why) = check(json(name, &member.node)) {
            good = false;
            problems.add(located(path(PATH, name), name, member, &why, &check));
        }
    }
    if !good {
        return None;
    }
    let all = table.iter().map(|(name, member)| (name.clone(), json(name, &member.node))).collect();
    match config(all) {
        Ok(config) => Some(config),
        Err(why) => {
            problems.add(Problem::new(member.key.clone(), PATH, format!("'{PATH}' is wrong: {why}")));
            None
        }
    }
}

fn config(members: Map<String, Value>) -> Result<ProjectConfig, String> {
    serde_json::from_value(Value::Object(members)).map_err(|e| e.to_string())
}

/// Finds the innermost value that is to blame for a complaint: the one without which it changes.
fn located(
    path_here: String,
    name: &str,
    member: &Member,
    why: &str,
    check: &dyn Fn(Value) -> Result<(), String>,
) -> Problem {
    let (unknown, known) = unknown_key(why);
    if let Some(unknown) = unknown {
        if unknown == name {
            return not_known(member, path_here, unknown, &known);
        }
        if let Kind::Table(table) = &member.node.kind
            && let Some(inner) = table.get(unknown)
        {
            return not_known(inner, path(&path_here, unknown), unknown, &known);
        }
    }
    match &member.node.kind {
        Kind::Table(table) => {
            for (inner_name, inner) in table {
                let with = |value: Option<Value>| {
                    let mut whole = members(table);
                    match value {
                        Some(value) => whole.insert(inner_name.clone(), value),
                        None => whole.remove(inner_name),
                    };
                    check(Value::Object(whole))
                };
                if with(None).err().as_deref() != Some(why) {
                    let check = |value| with(Some(value));
                    return located(path(&path_here, inner_name), inner_name, inner, why, &check);
                }
            }
        }
        Kind::List(items) => {
            let without = |i: usize| {
                let rest = items.iter().enumerate().filter(|(other, _)| *other != i);
                check(Value::Array(rest.map(|(_, item)| json("", item)).collect()))
            };
            let to_blame = |i: &usize| without(*i).err().as_deref() != Some(why);
            if let Some(item) = (0..items.len()).find(to_blame).and_then(|i| items.get(i)) {
                return wrong(path_here, "", item, why);
            }
        }
        _ => {}
    }
    wrong(path_here, name, &member.node, why)
}

/// Says of a value what it should be, in the words of the file rather than in serde's.
fn wrong(path_here: String, name: &str, node: &Node, why: &str) -> Problem {
    let expected = why.rsplit_once("expected ").filter(|_| why.starts_with("invalid type")).map(|(_, what)| what);
    let wanted = match expected {
        Some(_) if name.ends_with("_bytes") => "a number of bytes, or a size such as \"512M\"",
        Some(_) if name.ends_with("_ms") => "a number of milliseconds, or a duration such as \"90s\"",
        Some("u8" | "u16" | "u32" | "u64" | "usize" | "i32" | "i64") => "a whole number",
        Some("f64") => "a number",
        Some("a boolean") => "true or false",
        Some("a string") => "a text",
        Some("a sequence") => "a list",
        _ => {
            let message = if why.starts_with("invalid value: integer") {
                format!("'{path_here}' is out of its range")
            } else {
                format!("'{path_here}' is wrong: {why}")
            };
            return Problem::new(node.span.clone(), path_here, message);
        }
    };
    let is = match &node.kind {
        Kind::Text(text) => format!("{text:?}"),
        other => other.name().to_owned(),
    };
    let message = format!("'{path_here}' must be {wanted}, not {is}");
    Problem::new(node.span.clone(), path_here, message)
}

fn not_known(member: &Member, path_here: String, name: &str, known: &[&str]) -> Problem {
    let problem = Problem::new(member.key.clone(), path_here, format!("there is no setting '{name}'"));
    match nearest(name, known) {
        Some(near) => problem.hint(format!("did you mean '{near}'?")),
        None => problem.hint(format!("known are: {}", known.join(", "))),
    }
}

/// Takes apart what serde says of a member that it does not know: its name, and those that it knows.
fn unknown_key(why: &str) -> (Option<&str>, Vec<&str>) {
    if !why.starts_with("unknown field") {
        return (None, Vec::new());
    }
    let mut quoted = why.split('`').skip(1).step_by(2);
    (quoted.next(), quoted.collect())
}

fn members(table: &super::tree::Table) -> Map<String, Value> {
    table.iter().map(|(name, member)| (name.clone(), json(name, &member.node))).collect()
}

/// Turns a value into what the protocol carries; what is no size or duration stays a text, and is
/// complained about as such.
fn json(name: &str, node: &Node) -> Value {
    match &node.kind {
        Kind::Text(text) => {
            let measured = if name.ends_with("_bytes") {
                parse_bytes(text).ok()
            } else if name.ends_with("_ms") {
                parse_duration(text).ok().map(millis)
            } else {
                None
            };
            measured.map_or_else(|| Value::String(text.clone()), Value::from)
        }
        // One that is too large for TOML is too large for every setting.
        Kind::Integer(number) => number.map_or(Value::String("a number that is too large".into()), Value::from),
        Kind::Float(number) => Number::from_f64(*number).map_or(Value::Null, Value::Number),
        Kind::Bool(yes) => Value::Bool(*yes),
        Kind::Time(time) => Value::String(time.clone()),
        Kind::List(items) => Value::Array(items.iter().map(|item| json("", item)).collect()),
        Kind::Table(table) => Value::Object(members(table)),
    }
}
