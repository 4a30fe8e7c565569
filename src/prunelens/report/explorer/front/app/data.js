"use strict";
// Data files. A page that is opened from a disk may load scripts but not read files, so every data
// file is a script that calls prunelens.receive(name, data).
window.prunelens = (() => {
  const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i4: Int32Array, f4: Float32Array };
  const MOST_SHARDS = 24; // kept in memory; the rest is read again
  const files = new Map(); // name -> promise of its data
  const arrived = new Map(); // name -> data, between the call in the file and the end of its script

  const receive = (name, data) => { arrived.set(name, data); };

  const load = (name) => {
    const known = files.get(name);
    files.delete(name); // and put back behind the others: the oldest goes first
    const file = known || read(name);
    files.set(name, file);
    forgetOldest();
    return file;
  };

  const read = (name) => {
    const address = `${name.startsWith("labels/") ? "" : "data/"}${name}.js`;
    return script(address).then(() => {
      if (!arrived.has(name)) throw new Error(`The file ${address} does not hold what its name says.`);
      const data = arrived.get(name);
      arrived.delete(name);
      return data;
    }).catch((error) => { files.delete(name); throw error; });
  };

  const script = (address) => new Promise((resolve, reject) => {
    const element = document.createElement("script");
    element.src = address;
    element.onload = () => { element.remove(); resolve(); };
    element.onerror = () => {
      element.remove();
      reject(new Error(`The file ${address} could not be read. Is the folder whole?`));
    };
    document.head.append(element);
  });

  const forgetOldest = () => {
    const shards = [...files.keys()].filter((name) => name.includes("/contexts-"));
    for (const name of shards.slice(0, -MOST_SHARDS)) files.delete(name);
  };

  // A little-endian typed array in base64, as shards.py packs it; null stays null.
  const unpack = (packed) => {
    if (!packed) return null;
    const raw = atob(packed.base64);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
    return new ARRAYS[packed.type](bytes.buffer);
  };

  return { receive, load, script, unpack };
})();
