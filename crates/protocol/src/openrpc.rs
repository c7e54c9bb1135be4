//! The OpenRPC description of the protocol, made from the method table.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::error::Code;
use crate::method::METHODS;
use crate::subscription::EventNotification;

/// Makes the OpenRPC 1.3 document that `rpc.discover` serves and the repository keeps.
pub fn document() -> Value {
    let mut generator =
        SchemaGenerator::new(SchemaSettings::draft07().with(|s| s.definitions_path = "/components/schemas".into()));
    let mut methods = Vec::new();
    for method in METHODS {
        let params = (method.params)(&mut generator);
        let result = (method.result)(&mut generator);
        let mut list = parameter_list(&generator, &params.to_value());
        if method.mutating {
            list.push(json!({
                "name": "idempotency_key",
                "required": false,
                "description": "A key of your own, at most 128 bytes: the same call with the same key is carried out once.",
                "schema": { "type": "string", "maxLength": 128 },
            }));
        }
        methods.push(json!({
            "name": method.name,
            "summary": method.summary,
            "paramStructure": "by-name",
            "params": list,
            "result": { "name": "result", "schema": result },
            "x-role": method.role.as_str(),
            "x-mutating": method.mutating,
        }));
    }
    let _notification = generator.subschema_for::<EventNotification>();
    let schemas: Map<String, Value> = generator.take_definitions(true);
    let errors: Vec<Value> =
        Code::ALL.iter().map(|code| json!({ "code": code.number(), "message": code.as_str() })).collect();
    json!({
        "openrpc": "1.3.2",
        "info": {
            "title": "Fermata control protocol",
            "version": crate::rpc::PROTOCOL_VERSION.to_string(),
            "description": "JSON-RPC 2.0, one object per line, over a Unix socket.",
        },
        "methods": methods,
        "components": { "schemas": schemas },
        "x-errors": errors,
    })
}

/// Turns the schema of a parameter object into OpenRPC's list of named parameters.
fn parameter_list(generator: &SchemaGenerator, schema: &Value) -> Vec<Value> {
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next());
    let object = name.and_then(|name| generator.definitions().get(name)).unwrap_or(schema);
    let required: Vec<&str> = object
        .get("required")
        .and_then(Value::as_array)
        .map(|list| list.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let properties = object.get("properties").and_then(Value::as_object);
    let parameters = properties
        .into_iter()
        .flatten()
        .map(|(name, schema)| json!({ "name": name, "required": required.contains(&name.as_str()), "schema": schema }));
    parameters.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kept copy shows a reviewer every change of the protocol; `UPDATE_GOLDEN=1` rewrites it.
    #[test]
    fn the_kept_openrpc_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openrpc.json");
        let made = format!("{:#}\n", document());
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &made).expect("the document can be written");
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(made == kept, "crates/protocol/openrpc.json is stale: run the tests with UPDATE_GOLDEN=1");
    }
}
